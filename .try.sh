cd /tmp/wt/harness; PYTHONPATH=$PWD/src:$PWD OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 timeout -k 5 ${T:-300} .venv/bin/python /tmp/try_hostile.py "$@" 2>&1
