"""Where one scene of a source ends and the next begins: by a network, by differences of frames, or by PySceneDetect."""
