"""The layers of one range on one device: KV blocks, forward, sampling."""
