"""What is checked of a message before anything in it is believed."""
