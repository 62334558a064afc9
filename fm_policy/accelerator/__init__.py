"""Push-T from pixels on a rented accelerator, where LeRobot is not installed: `eval/accelerator.py`.

Only `data.pack` and `shards.assemble` need LeRobot; they run at home, before and after.
"""
