"""The engine of every evaluation: batched episodes, a row for each, statistics. Knows LeRobot's interfaces, no task."""
