"""From a byte range to frames: several decoders behind one interface, in processes that can be killed."""
