"""The command line; installed as octav_calibrate_cli."""
