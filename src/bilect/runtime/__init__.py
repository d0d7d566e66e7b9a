"""Where things run: devices, precision, ranks."""
