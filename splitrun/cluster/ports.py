"""The ports of a node: one range of a hundred from its base, so that one firewall rule opens them all.

    base           the head's registry (Ray's GCS)
    base + 1 … 6   Ray's services of the node
    base + 10 … 49 Ray's workers and whoever drives them
    base + 50 … 99 splitrun's own sockets: activations and tokens

Pure arithmetic and addresses of this machine.
"""

from __future__ import annotations

import ipaddress
import socket

from splitrun.errors import ClusterError

BASE = 7400
COUNT = 100
LOOPBACK = "127.0.0.1"


def data_ports(base: int) -> tuple[int, int]:
    """First and last port for splitrun's own sockets."""
    return base + 50, base + COUNT - 1


def split_address(text: str) -> tuple[str, int]:
    """ "192.168.1.5:7400" as host and port; raises ClusterError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 - COUNT:
        raise ClusterError(f"{text!r} is not HOST:PORT, such as 192.168.1.5:{BASE}")
    try:
        return socket.gethostbyname(host), int(port)
    except (OSError, UnicodeError) as error:
        raise ClusterError(f"the host {host} cannot be found: {error}; give its address in numbers") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    return ipaddress.ip_address(host).is_loopback


def own_addresses() -> list[str]:
    """The IPv4 addresses of this machine beside the loopback."""
    import psutil  # here, because naming ports needs none

    found = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries
             if entry.family == socket.AF_INET]  # fmt: skip
    return [address for address in found if not is_loopback(address)]


def own_address(host: str) -> str:
    """``host`` in numbers, if it is an address of this machine; raises ClusterError naming those that are."""
    try:
        address = socket.gethostbyname(host)
    except (OSError, UnicodeError) as error:
        raise ClusterError(f"the host {host} cannot be found: {error}; give an address of this machine") from error
    known = own_addresses()
    if address not in known and not is_loopback(address):
        others = ", ".join(known) or "no other than the loopback"
        raise ClusterError(f"--host {host} is no address of this machine: it has {others}")
    return address


def address_towards(host: str, port: int) -> str:
    """The address of this machine that packets to ``host`` leave from."""
    if is_loopback(host):
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        try:
            probe.connect((host, port))
        except OSError as error:
            raise ClusterError(
                f"there is no way to {host}: {error.strerror}; are both machines in one network?"
            ) from error
        return str(probe.getsockname()[0])


def require_free(host: str, base: int) -> None:
    """Raise ClusterError when the node's fixed ports are taken."""
    for port in range(base, base + 7):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ClusterError(
                    f"port {port} on {host} is taken ({error.strerror}): stop what uses it, or choose another --port"
                ) from error


def answers(host: str, port: int, wait_s: float = 0.5) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection((host, port), wait_s).close()
    except OSError:
        return False
    return True


def require_reachable(host: str, port: int, wait_s: float = 5.0) -> None:
    """Raise ClusterError when nobody listens there, with what a home network usually gets wrong."""
    try:
        socket.create_connection((host, port), wait_s).close()
    except ConnectionRefusedError as error:
        mend = f"start the first machine with 'splitrun node start --host {host}'"
        if is_loopback(host):
            mend += "; if that is another machine, give its own address on both"
        raise ClusterError(f"nobody listens on {host}:{port}: {mend}") from error
    except OSError as error:
        raise ClusterError(
            f"{host}:{port} cannot be reached ({error}): is it the address of the right interface, and does the "
            f"firewall there let TCP ports {port}-{port + COUNT - 1} in?"
        ) from error
