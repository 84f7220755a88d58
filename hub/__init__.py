"""Building, converting and checking model folders."""
