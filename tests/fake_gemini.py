"""A loopback server that speaks Gemini's REST form, single calls and batch jobs, and one that speaks its gRPC form.

The reply to a prompt is ECHO and the last user's text. Marks in the prompt make other replies: `[[length]]`,
`[[safety]]`, `[[blocked]]` (the prompt itself is refused), `[[empty]]`, `[[rerouted]]`, `[[thought]]`, `[[odd]]` (an
ending nobody knows), `[[bad]]` 400, `[[busy]]` 429 with RetryInfo at the first call, `[[broken]]` 500, `[[slow]]` nothing
until the server ends, `[[garbage]]` no JSON.
"""
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ECHO, KEY = 'echo: ', 'gemini-test-key-1234567890'
VERSION = re.compile(r'^/v1\w*/')
MARK = re.compile(r'\[\[(\w+)\]\]')
RETRY = {'@type': 'type.googleapis.com/google.rpc.RetryInfo', 'retryDelay': '0.25s'}


def reply(request, model):
    "Answer one request as the service would; a marked one otherwise."
    prompt = request['contents'][-1]['parts'][0]['text']
    mark = (MARK.findall(prompt) or [''])[0]
    usage = {'promptTokenCount': len(prompt), 'candidatesTokenCount': 5, 'totalTokenCount': len(prompt) + 5}
    if mark == 'blocked': return {'promptFeedback': {'blockReason': 'PROHIBITED_CONTENT'}, 'usageMetadata': {'promptTokenCount': len(prompt)}}
    parts = [{'text': '' if mark == 'empty' else ECHO + prompt}]
    if mark == 'thought':
        parts = [{'text': '先想一想', 'thought': True}, *parts]
        usage |= {'thoughtsTokenCount': 40, 'totalTokenCount': len(prompt) + 45}
    ending = {'length': 'MAX_TOKENS', 'safety': 'SAFETY', 'odd': 'TOO_MANY_MOONS'}.get(mark, 'STOP')
    answered = 'gemini-9-nano' if mark == 'rerouted' else f'{model}-001'
    return {'candidates': [{'content': {'role': 'model', 'parts': parts}, 'finishReason': ending, 'index': 0}],
            'usageMetadata': usage, 'modelVersion': answered}


def error(code, status, message, *details): return code, {'error': {'code': code, 'status': status, 'message': message, 'details': details}}


class Fake:
    "What the server knows and has seen."
    def __init__(self):
        self.calls, self.keys, self.jobs, self.polls = [], [], [], 0
        self.work, self.ending, self.faults = 2, 'BATCH_STATE_SUCCEEDED', [] # Looks until a job ends, and how; next job posts
        self.lag = 0.0 # Seconds until a new job is listed
        self.over = threading.Event() # Nobody waits for anything any more

    def generate(self, model, request):
        "Answer a single call."
        self.calls.append(request)
        prompt = request['contents'][-1]['parts'][0]['text']
        mark = (MARK.findall(prompt) or [''])[0]
        asked = sum(call['contents'][-1]['parts'][0]['text'] == prompt for call in self.calls)
        if mark == 'bad': return error(400, 'INVALID_ARGUMENT', f'no such thing; key {self.keys[-1]}')
        if mark == 'busy' and asked == 1: return error(429, 'RESOURCE_EXHAUSTED', 'quota', RETRY)
        if mark == 'broken': return error(500, 'INTERNAL', 'oops')
        if mark == 'garbage': return 200, '<html>hello</html>'
        if mark == 'slow': self.over.wait(600)
        return 200, reply(request, model)

    def submit(self, model, batch):
        "Take a job."
        fault = self.faults.pop(0) if self.faults else None
        if fault and fault != 'lost': return fault
        self.jobs.append({'name': f'batches/{len(self.jobs) + 1:04d}', 'model': model, 'looks': 0, 'time': time.time(),
                          'display': batch['displayName'], 'items': batch['inputConfig']['requests']['requests']})
        return (503, 'gone') if fault else (200, self.show(self.jobs[-1], False))

    def show(self, job, whole=True):
        "Tell how a job stands."
        job['looks'] += whole
        state = self.ending if job['looks'] >= self.work else 'BATCH_STATE_RUNNING' if job['looks'] else 'BATCH_STATE_PENDING'
        told = {'name': job['name'], 'metadata': {'displayName': job['display'], 'state': state, 'model': job['model']}}
        if whole and state == 'BATCH_STATE_SUCCEEDED':
            told['metadata']['output'] = {'inlinedResponses': {'inlinedResponses': [self.item(item, job['model']) for item in job['items']]}}
        return told

    def item(self, item, model):
        "Answer one request of a job."
        prompt = item['request']['contents'][-1]['parts'][0]['text']
        if '[[bad]]' in prompt: return {'error': {'code': 3, 'message': 'no such thing'}, 'metadata': item['metadata']}
        return {'response': reply(item['request'], model.removeprefix('models/')), 'metadata': item['metadata']}

    def listed(self):
        "List all jobs that can be seen."
        return {'operations': [self.show(job, False) for job in self.jobs if time.time() > job['time'] + self.lag]}

    def look(self, name):
        "Find a job."
        job = next((job for job in self.jobs if job['name'] == name), None)
        return (200, self.show(job)) if job else error(404, 'NOT_FOUND', 'no such job')


@contextmanager
def serve_rest(fake):
    "Run the REST server in a thread; gives its address."
    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        def log_message(self, *_): pass

        def do_GET(self):
            path = VERSION.sub('', self.path.split('?')[0])
            self.answer(200, fake.listed()) if path == 'batches' else self.answer(*fake.look(path))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            fake.keys.append(self.headers['x-goog-api-key'])
            model, _, verb = VERSION.sub('', self.path.split('?')[0]).removeprefix('models/').partition(':')
            if fake.keys[-1] != KEY: return self.answer(*error(
                400, 'INVALID_ARGUMENT', 'API key not valid.', {'reason': 'API_KEY_INVALID', '@type': 'type.googleapis.com/google.rpc.ErrorInfo'}))
            if model == 'gone': return self.answer(*error(404, 'NOT_FOUND', 'models/gone is not found'))
            self.answer(*(fake.submit(f'models/{model}', body['batch']) if verb == 'batchGenerateContent' else fake.generate(model, body)))

        def answer(self, status, body):
            raw = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header('Content-Type', 'application/json')
            self.send_header('Content-Length', str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        def handle_error(self, *_): pass # callers that hang up are what is tested

    server = Server(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally:
        fake.over.set()
        server.shutdown()
        server.server_close()


@contextmanager
def serve_grpc(fake):
    "Run the gRPC server in threads; gives its address."
    from concurrent.futures import ThreadPoolExecutor
    import grpc
    from google.ai.generativelanguage import GenerateContentRequest, GenerateContentResponse
    from google.protobuf import any_pb2, duration_pb2, json_format
    from google.protobuf.unknown_fields import UnknownFieldSet
    from google.rpc import code_pb2, error_details_pb2, status_pb2
    from grpc_status import rpc_status

    def generate(request, context):
        fake.keys.append(dict(context.invocation_metadata()).get('x-goog-api-key'))
        if fake.keys[-1] != KEY: context.abort(grpc.StatusCode.UNAUTHENTICATED, f'bad key {fake.keys[-1]}')
        model = request.model.removeprefix('models/')
        if model == 'gone': context.abort(grpc.StatusCode.NOT_FOUND, 'models/gone is not found')
        body = json_format.MessageToDict(GenerateContentRequest.pb(request))
        unknown = UnknownFieldSet(GenerateContentRequest.pb(request).generation_config) # this library does not know seeds
        body['generationConfig'] |= {{8: 'seed'}.get(one.field_number, 'unknown'): one.data for one in unknown}
        status, told = fake.generate(model, body)
        if status == 429:
            detail = any_pb2.Any()
            detail.Pack(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=250_000_000)))
            context.abort_with_status(rpc_status.to_status(status_pb2.Status(
                code=code_pb2.RESOURCE_EXHAUSTED, message='quota', details=[detail])))
        if status != 200: context.abort(grpc.StatusCode.INTERNAL if status == 500 else grpc.StatusCode.INVALID_ARGUMENT, told['error']['message'])
        return GenerateContentResponse.from_json(json.dumps(told), ignore_unknown_fields=True)

    class Service(grpc.GenericRpcHandler):
        def service(self, call):
            if not call.method.endswith('GenerativeService/GenerateContent'): return None
            return grpc.unary_unary_rpc_method_handler(generate, GenerateContentRequest.deserialize, GenerateContentResponse.serialize)

    server = grpc.server(ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((Service(),))
    port = server.add_insecure_port('127.0.0.1:0')
    server.start()
    try: yield f'grpc://127.0.0.1:{port}'
    finally:
        fake.over.set()
        server.stop(None)
