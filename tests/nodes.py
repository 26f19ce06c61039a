"Ray nodes as processes of this machine, small, and ended by their ids whatever happens."
import os
import signal
import threading
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
    """Give the variables that make Ray's processes start in a third of the time, and have time for it.

    Each imports jsonschema, which builds the grammar of rfc3987_syntax (it comes with JupyterLab) if it can be imported:
    seconds of a processor, a process, for nothing that Ray needs."""
    (folder / 'light').mkdir(exist_ok=True)
    (folder / 'light/rfc3987_syntax.py').write_text('raise ImportError\n')
    places = [folder / 'light', HERE, os.environ.get('PYTHONPATH', '')]
    return {'PYTHONPATH': os.pathsep.join(str(place) for place in places if place),
            'RAY_USAGE_STATS_ENABLED': '0', 'RAY_gcs_server_port_wait_time_s': '120'}


def processes(node):
    "List the processes of a node, workers too."
    found = []
    for info in (info for infos in node.all_processes.values() for info in infos):
        if psutil.pid_exists(info.process.pid):
            process = psutil.Process(info.process.pid)
            found += [process, *process.children(recursive=True)]
    return found


def amid(node, port):
    "Tell whether a worker of a node has calls under way at a server of this machine, or had a moment ago."
    try: found = [process.net_connections('tcp') for process in processes(node) if 'run_shard' in process.name()]
    except psutil.Error: return False
    return any(one.raddr and one.raddr.port == port and one.status == 'ESTABLISHED' for ones in found for one in ones)


def kill(found):
    "End processes at once, by their ids."
    for process in found:
        try: process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess: pass
    psutil.wait_procs(found, timeout=20)


def start(cluster, **settings):
    "Start a node; Ray gives its processes 30 seconds to start and no setting changes that."
    try: return cluster.add_node(object_store_memory=MEMORY, include_dashboard=False, **settings)
    except Exception as error: # Ray raises nothing more special
        if 'timed out during startup' not in str(error): raise
        pytest.skip('this machine is too busy for Ray: a node did not start in its 30 seconds')


def whereabouts(seconds):
    "Work for a while, import what asking takes, and say on which node this is."
    import kyara.providers
    import ray
    time.sleep(seconds)
    return ray.get_runtime_context().get_node_id()


class Nodes:
    "A cluster of nodes."
    def __init__(self, cluster): self.cluster, self.address, self.others = cluster, cluster.address, []

    def add(self, **settings):
        self.others.append(start(self.cluster, **{'num_cpus': 1, **settings}))
        return self.others[-1]

    def warm(self, node, workers):
        "Give work to so many workers until one of a node has done some."
        from kyara.cluster import RayEngine
        end = time.monotonic() + 300
        while node.node_id not in RayEngine(workers).map(whereabouts, [0.5] * 2 * workers):
            assert time.monotonic() < end, 'the node does nothing'

    def kill(self, node):
        "Kill a node with everything on it."
        kill(processes(node))

    @contextmanager
    def killing(self, node, server, share):
        "Kill a node in the middle of a shard when a server has answered so many calls; give the list that will say at how many."
        killed, ended = [], threading.Event()
        def watch():
            while not ended.wait(0.02) and not killed:
                if server.stats(brief=True).answered < share or not amid(node, server.port): continue
                self.kill(node)
                killed.append(server.stats(brief=True).answered)
        thread = threading.Thread(target=watch)
        thread.start()
        try: yield killed
        finally:
            ended.set()
            thread.join()


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
