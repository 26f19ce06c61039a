"Ray nodes as processes of this machine, small, and ended by their ids whatever happens."
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

HERE = Path(__file__).parent
MEMORY = 80 * 2**20 # Of a node's object store; Ray wants 75 MB at least


@contextmanager
def environment(**values):
    "Set variables for a while."
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try: yield
    finally:
        for name, value in before.items():
            if value is None: del os.environ[name]
            else: os.environ[name] = value


def light_start(folder):
    """Give the variables that make Ray's processes start in a third of the time.

    Each imports jsonschema, which builds the grammar of rfc3987_syntax (it comes with JupyterLab) if it can be imported:
    seconds of a processor, a process, for nothing that Ray needs."""
    (folder / 'light').mkdir(exist_ok=True)
    (folder / 'light/rfc3987_syntax.py').write_text('raise ImportError\n')
    places = [folder / 'light', HERE, os.environ.get('PYTHONPATH', '')]
    return {'PYTHONPATH': os.pathsep.join(str(place) for place in places if place), 'RAY_USAGE_STATS_ENABLED': '0'}


def processes(node):
    "List the processes of a node, workers too."
    found = []
    for info in (info for infos in node.all_processes.values() for info in infos):
        if psutil.pid_exists(info.process.pid):
            process = psutil.Process(info.process.pid)
            found += [process, *process.children(recursive=True)]
    return found


def at_work(node):
    "Tell whether a worker of a node runs a shard."
    try: return any('run_shard' in process.name() for process in processes(node))
    except psutil.NoSuchProcess: return False


def kill(found):
    "End processes at once, by their ids."
    for process in found:
        try: process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess: pass
    psutil.wait_procs(found, timeout=20)


def start(cluster, **settings):
    "Start a node; Ray gives its processes 15 seconds to start and no setting changes that."
    try: return cluster.add_node(object_store_memory=MEMORY, include_dashboard=False, **settings)
    except Exception as error: # Ray raises nothing more special
        if 'timed out during startup' not in str(error): raise
        pytest.skip('this machine is too busy for Ray: a node did not start in its 15 seconds')


class Nodes:
    "A cluster of nodes."
    def __init__(self, cluster): self.cluster, self.address, self.others = cluster, cluster.address, []

    def add(self, **settings):
        self.others.append(start(self.cluster, **{'num_cpus': 1, **settings}))
        return self.others[-1]

    def kill(self, node):
        "Kill a node with everything on it."
        kill(processes(node))


@contextmanager
def ray_nodes(folder, others=1, cpus=1):
    "Start a head and other nodes and connect to them."
    ray = pytest.importorskip('ray', reason='pip install "kyara[ray]"')
    from ray.cluster_utils import Cluster
    quick = {'health_check_initial_delay_ms': 1000, 'health_check_period_ms': 1000, 'health_check_failure_threshold': 10}
    with environment(**light_start(folder)):
        cluster = Cluster()
        try:
            start(cluster, num_cpus=cpus, _system_config=quick)
            nodes = Nodes(cluster)
            for _ in range(others): nodes.add()
            ray.init(address=cluster.address, logging_level='ERROR', log_to_driver=False)
            yield nodes
        finally:
            everything = [process for node in list(cluster.list_all_nodes()) for process in processes(node)]
            ray.shutdown()
            try: cluster.shutdown()
            finally: kill(everything)
