"""Many adapters over one running model: on disk, in memory, on the device."""
