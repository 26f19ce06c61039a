"""A Qdrant server's REST interface before qdrant-client's local mode, for tests: the wire is real, the engine is not."""
import json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from qdrant_client import QdrantClient, models

class FakeQdrant:
    "Serves on loopback and asks for `key`; `requests` lists what came."
    def __init__(self, key: str = ''):
        self.key, self.client, self.requests, self.lock = key, QdrantClient(':memory:'), [], threading.Lock()
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
        with self.lock: result = self.do(handler.command, collection, action, json.loads(body) if body else {})
        self.send(handler, 200, {'result': result, 'status': 'ok', 'time': 0.0})

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
