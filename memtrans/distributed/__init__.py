"""What is known of several processes."""
