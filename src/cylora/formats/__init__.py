"""Files: how cylora writes what it has learned. Every file appears whole or not at all (`durable`)."""
