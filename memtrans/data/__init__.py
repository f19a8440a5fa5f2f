"""Documents, where they come from, and the streams that rows read."""
