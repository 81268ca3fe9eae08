"""What `run_all.sh` calls; no notebook imports anything from here. Read `__main__` first: the command line, and how a
notebook is executed. `kernels` makes their start quick, `publish` turns an executed copy into the committed one."""
