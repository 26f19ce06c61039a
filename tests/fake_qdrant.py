"""A Qdrant server for tests: the real one where `qdrant` is on PATH, and its REST interface before qdrant-client's local mode."""
import contextlib, json, os, shutil, socket, subprocess, threading, time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ResponseHandlingException

@contextlib.contextmanager
def real_qdrant(folder: Path, key: str) -> Iterator[str]: # Its address
    "Run the server on PATH in a folder of its own."
    folder.mkdir()
    with socket.create_server(('127.0.0.1', 0)) as one, socket.create_server(('127.0.0.1', 0)) as other:
        ports = [place.getsockname()[1] for place in (one, other)]
    settings = {'SERVICE__HTTP_PORT': ports[0], 'SERVICE__GRPC_PORT': ports[1], 'SERVICE__API_KEY': key, 'SERVICE__HOST': '127.0.0.1',
                'STORAGE__STORAGE_PATH': folder / 'storage', 'STORAGE__SNAPSHOTS_PATH': folder / 'snapshots', 'TELEMETRY_DISABLED': 'true'}
    environment = os.environ | {f'QDRANT__{name}': str(value) for name, value in settings.items()}
    with open(folder / 'log', 'w') as log: process = subprocess.Popen([shutil.which('qdrant')], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        client = QdrantClient(url=f'http://127.0.0.1:{ports[0]}', api_key=key, check_compatibility=False)
        for _ in range(3000):
            with contextlib.suppress(ResponseHandlingException):
                client.get_collections()
                break
            assert process.poll() is None, (folder / 'log').read_text()
            time.sleep(0.1)
        yield f'http://127.0.0.1:{ports[0]}'
    finally:
        process.kill()
        process.wait()

class FakeQdrant:
    """Serves on loopback and asks for `key`; `requests` lists what came, `most` is how many upserts were under way at once.

    `trouble` is called with an upsert's number, 'before' its points are written and 'after'. It may take its time, return True to
    break the connection off, or a status to answer with.
    """
    def __init__(self, key: str = '', trouble: Callable[[int, str], bool | int | None] = lambda number, moment: None):
        self.key, self.client, self.requests, self.lock = key, QdrantClient(':memory:'), [], threading.Lock()
        self.trouble, self.upserts, self.under_way, self.most = trouble, 0, 0, 0
        owner = self
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self): owner.answer(self)
            do_PUT = do_POST = do_GET
            def log_message(self, *_): pass
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self): return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler):
        body = handler.rfile.read(int(handler.headers.get('Content-Length') or 0))
        path = handler.path.partition('?')[0]
        self.requests.append((handler.command, path))
        if self.key and handler.headers.get('api-key') != self.key: return self.send(handler, 401, {'status': {'error': 'no'}})
        collection, action = (path.split('/', 3) + [''])[2:4]
        work = lambda: self.do(handler.command, collection, action, json.loads(body) if body else {})
        upserting = (handler.command, action) == ('PUT', 'points')
        failure, result = self.upsert(work) if upserting else (None, self.alone(work))
        if failure is True: return handler.connection.close()
        self.send(handler, failure or 200, {'result': result, 'status': 'ok', 'time': 0.0})

    def alone(self, work):
        with self.lock: return work()

    def upsert(self, work):
        with self.lock:
            self.upserts, self.under_way = self.upserts + 1, self.under_way + 1
            number, self.most = self.upserts, max(self.most, self.under_way)
        failure = self.trouble(number, 'before')
        result = None if failure else self.alone(work)
        failure = failure or self.trouble(number, 'after')
        with self.lock: self.under_way -= 1
        return failure, result

    def send(self, handler, status, value):
        data = json.dumps(value, default=lambda item: item.model_dump(mode='json')).encode()
        handler.send_response(status)
        handler.send_header('Content-Type', 'application/json')
        handler.send_header('Content-Length', str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def do(self, method, collection, action, body):
        client, done = self.client, {'operation_id': 0, 'status': 'completed'}
        if action == 'exists': return {'exists': client.collection_exists(collection)}
        if action == '' and method == 'GET': return client.get_collection(collection)
        if action == '':
            made = models.CreateCollection(**body)
            return client.create_collection(collection, made.vectors or {}, sparse_vectors_config=made.sparse_vectors)
        if action == 'index': return done
        if action == 'points' and method == 'PUT':
            client.upsert(collection, models.PointsList(**body).points)
            return done
        if action == 'points/delete':
            client.delete(collection, models.PointIdsList(**body))
            return done
        if action == 'points/count': return {'count': client.count(collection).count}
        if action == 'points': return client.retrieve(collection, body['ids'])
        if action == 'points/scroll':
            points, offset = client.scroll(collection, limit=body['limit'], offset=body.get('offset'))
            return {'points': points, 'next_page_offset': offset}
        assert action == 'points/query/batch', (method, action)
        return client.query_batch_points(collection, models.QueryRequestBatch(**body).searches)
