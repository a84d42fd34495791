"""When tokens move from tier to tier: decided on the host, from counts alone."""
