"""Data paths, one file each, chosen by the ``Backend.Type`` of the network configuration."""
