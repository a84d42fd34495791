"""What an event does on the device: which candidates there are, how they score, and the tables that change."""
