"""Where demonstrations come from: readers of the public formats, all of which end in a LeRobotDataset."""
