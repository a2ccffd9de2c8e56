"""The law of the stream, shown with real processes while they are killed, frozen and cut off."""
