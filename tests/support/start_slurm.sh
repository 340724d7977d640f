#!/usr/bin/env bash
# A real Slurm on this machine alone: munged, slurmctld and slurmd, as root. For tests; what runs already is left as it is.
#   apt-get install --no-install-recommends slurm-wlm munge && tests/support/start_slurm.sh && pytest -m slurm
set -euo pipefail

if sinfo >/dev/null 2>&1; then
    echo "Slurm runs already"
    exit 0
fi
host=$(hostname -s)
cat >/etc/slurm/slurm.conf <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is put back into the queue starts again when its credential has expired.
AuthInfo=cred_expire=5
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurmctld.log
SlurmdLogFile=/var/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=1,sched_interval=1
KillWait=20
# More processors than there may be: a small machine runs several tasks, too.
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8
CONF
mkdir -p /run/munge /var/log/munge /var/spool/slurmctld /var/spool/slurmd
chown munge: /run/munge /var/log/munge
test -s /etc/munge/munge.key || { dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 status=none; }
chown munge: /etc/munge/munge.key
chmod 400 /etc/munge/munge.key
munge -n >/dev/null 2>&1 || runuser -u munge -- munged
slurmctld
slurmd
for _ in $(seq 60); do
    if [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ]; then
        sinfo
        exit 0
    fi
    sleep 0.5
done
tail -n 20 /var/log/slurmctld.log /var/log/slurmd.log >&2
exit 1
