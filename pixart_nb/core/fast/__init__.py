"""The inference path of each device: the numbers of ``models`` with fewer operations."""
