"""Published figures of well-known devices and links, as data; read by ``splitrun.planner.datasheet``."""
