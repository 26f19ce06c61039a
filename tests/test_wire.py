"What a connection has to bear: real sockets, both event loops, TLS with certificates made here."
import asyncio, gzip, ipaddress, socket, ssl, zlib
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime, timedelta, timezone

import psutil
import pytest
import uvloop

from kyara import wire
from kyara.core import ModelSettings, UserError
from kyara.llm import Refused, Request
from kyara.openai import open_openai
from kyara.wire import Broken, Unreachable, open_line

OK, BODY = b'HTTP/1.1 200 OK\r\n', '{"高": 3952}'.encode()
PATIENCE = 120 # Seconds that a call may take on however slow a machine
WHOLE = OK + b'Content-Length: %d\r\n\r\n' % len(BODY) + BODY
CHUNKS = OK + b'Transfer-Encoding: chunked\r\n\r\n' + b''.join(b'1\r\n%c\r\n' % byte for byte in BODY) + b'0\r\nX-Trailer: x\r\n\r\n'
with_length = lambda body, *lines: OK + b''.join(line + b'\r\n' for line in lines) + b'Content-Length: %d\r\n\r\n' % len(body) + body


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=['asyncio', 'uvloop'])
def run(request, monkeypatch):
    "Run a coroutine on either event loop; connections stay fresh however slow the machine is."
    monkeypatch.setattr(wire, 'IDLE', 3600)
    for name in ('HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY', 'http_proxy', 'https_proxy', 'all_proxy'): monkeypatch.delenv(name, raising=False)
    return lambda work: request.param(asyncio.wait_for(work, 600))


class Server:
    "What a server has seen: the requests of each connection, and how many connections have ended."
    def __init__(self): self.connections, self.ended, self.port = [], 0, 0
    @property
    def url(self): return f'http://127.0.0.1:{self.port}/v1/chat/completions'


@asynccontextmanager
async def serving(answer, host='127.0.0.1', certificate=None):
    "Serve; `answer` is a coroutine function that takes a writer, the number of the request and what it says."
    seen, tasks = Server(), set()
    async def talk(reader, writer):
        requests = []
        seen.connections.append(requests)
        tasks.add(asyncio.current_task())
        try:
            while head := await reader.readuntil(b'\r\n\r\n'):
                length = int(head.lower().partition(b'content-length: ')[2].partition(b'\r\n')[0])
                requests.append(head + (await reader.readexactly(length) if length < 1000 else b''))
                if await answer(writer, sum(map(len, seen.connections)), requests[-1]) == 'end': break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError, ssl.SSLError): pass
        finally:
            seen.ended += 1
            writer.close()
    server = await asyncio.start_server(talk, host, 0, ssl=certificate)
    seen.port = server.sockets[0].getsockname()[1]
    try: yield seen
    finally:
        server.close()
        for task in tasks: task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def replying(*replies, piece=0, pause=0.0):
    "Answer the first request with the first reply, and so on, the last one for ever; in pieces, if wanted."
    async def answer(writer, number, request):
        reply = replies[min(number, len(replies)) - 1]
        for start in range(0, len(reply), piece or len(reply) or 1):
            writer.write(reply[start:start + (piece or len(reply))])
            if piece: await writer.drain()
            if piece: await asyncio.sleep(0)
        await asyncio.sleep(pause)
        if reply is not WHOLE and b'\r\n\r\n' in reply and b'Length' not in reply and b'chunked' not in reply: return 'end'
    return answer


async def outcome(line, body=b'{}'):
    try: return (await line.post(body)).body
    except (Unreachable, Broken) as error: return error

# What comes whole


@pytest.mark.parametrize('piece', [0, 1], ids=['at_once', 'byte_by_byte'])
@pytest.mark.parametrize('reply', [
    WHOLE, CHUNKS, OK + b'\r\n' + BODY, b'HTTP/1.1 100 Continue\r\n\r\n' + WHOLE, b'HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n' + CHUNKS,
    with_length(gzip.compress(BODY), b'content-encoding: GZIP'), with_length(zlib.compress(BODY), b'Content-Encoding: deflate'),
    with_length(BODY, b'X-Odd: \xe5\xb1\xb1', b'Content-Encoding: identity'), b'HTTP/1.0 200 OK\r\nContent-Length: 13\r\n\r\n' + BODY,
    with_length(BODY, b'Connection: Upgrade, Keep-Alive', b'Upgrade: h2,h2c')],
    ids=['length', 'chunked', 'to_the_end', 'continue', 'hints', 'gzip', 'deflate', 'odd_header', 'http_1.0', 'upgrade_offered'])
def test_every_form_of_a_reply_is_read(run, reply, piece):
    async def main():
        async with serving(replying(reply, piece=piece)) as server, open_line(server.url, {}, PATIENCE) as line:
            return [await outcome(line) for _ in range(3)]
    assert run(main()) == [BODY] * 3


def test_connections_are_kept_and_as_many_as_calls_at_once(run):
    async def main():
        async with serving(replying(WHOLE, pause=0.001)) as server, open_line(server.url, {'X-Own': 'yes'}, PATIENCE) as line:
            calls = iter(range(200))
            async def work(): return [await outcome(line, b'{"n": %d}' % number) for number in calls]
            got = sum(await asyncio.gather(*(work() for _ in range(8))), [])
            return got, server.connections
    got, connections = run(main())
    requests = sum(connections, [])
    assert got == [BODY] * 200 and len(connections) <= 8
    assert sorted(int(request.partition(b'"n": ')[2].rstrip(b'}')) for request in requests) == list(range(200))
    assert all(request.startswith(b'POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:') and b'\r\nX-Own: yes\r\n' in request for request in requests)


@pytest.mark.parametrize('reply', [with_length(BODY, b'Connection: close'), OK + b'\r\n' + BODY, WHOLE + WHOLE, WHOLE + b'\r\nHTTP'],
                         ids=['close', 'to_the_end', 'two_replies', 'more'])
def test_a_connection_with_anything_left_on_it_is_not_used_again(run, reply):
    "Above all, no call gets the reply of another."
    async def main():
        async with serving(replying(reply, with_length(b'second'))) as server, open_line(server.url, {}, PATIENCE) as line:
            return await outcome(line), await outcome(line), [len(one) for one in server.connections]
    assert run(main()) == (BODY, b'second', [1, 1])


def test_what_a_server_says_unasked_ends_the_connection(run):
    async def main():
        first = asyncio.Event()
        async def answer(writer, number, request):
            writer.write(WHOLE)
            if number > 1: return
            await first.wait()
            writer.write(with_length(b'stray'))
        async with serving(answer) as server, open_line(server.url, {}, PATIENCE) as line:
            got = await outcome(line)
            first.set()
            while line.idle[0].open: await asyncio.sleep(0.001)
            return got, await outcome(line), len(server.connections)
    assert run(main()) == (BODY, BODY, 2)


def test_an_error_without_a_body_keeps_its_status_and_headers(run):
    "Some servers say that nothing is packed."
    busy = b'HTTP/1.1 429 Busy\r\nContent-Encoding: gzip\r\nRetry-After: 3\r\nContent-Length: 0\r\n\r\n'
    async def main():
        async with serving(replying(busy)) as server, open_line(server.url, {}, PATIENCE) as line:
            return await line.post(b'{}')
    answer = run(main())
    assert (answer.status, answer.headers['retry-after'], answer.body) == (429, '3', b'')


def test_a_reply_before_the_request_is_read_counts(run):
    "A server that will not read 30 MB says so at once."
    async def main():
        async with serving(replying(b'HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n', WHOLE)) as server, open_line(server.url, {}, PATIENCE) as line:
            first = await line.post(b' ' * 30_000_000)
            return first.status, await outcome(line), len(server.connections)
    assert run(main()) == (413, BODY, 2)

# What does not


@pytest.mark.parametrize('reply, said', [
    (WHOLE[:-1], 'inside the reply'), (CHUNKS[:-1], 'inside the reply'), (CHUNKS[:-40], 'inside the reply'), (OK, 'inside the reply'), (b'', 'before the reply'),
    (b'SSH-2.0-OpenSSH_9.7\r\n', 'no HTTP'), (OK + b'Content-Length: -5\r\n\r\n', 'no HTTP'), (OK + b'Content-Length: 5\r\nContent-Length: 6\r\n\r\n12345', 'no HTTP'),
    (OK + b'Transfer-Encoding: chunked\r\n\r\nzz\r\n', 'no HTTP'), (b'HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n', 'no HTTP'),
    (OK + b'X: ' + b'x' * 100_000, 'too long'), (b'HTTP/1.1 100 Continue\r\n\r\n' * 5000, 'too long'), (with_length(b'x' * 300_000), 'too long'),
    (OK + b'Transfer-Encoding: chunked\r\n\r\n' + b'1\r\nx\r\n' * 80_000, 'too long'),
    (with_length(gzip.compress(b'x' * 300_000), b'Content-Encoding: gzip'), 'more than'), (with_length(gzip.compress(BODY)[:-4], b'Content-Encoding: gzip'), 'not whole'),
    (with_length(BODY, b'Content-Encoding: gzip'), 'unpacked'), (with_length(BODY, b'Content-Encoding: br'), 'packed as br'), (with_length(BODY, b'Content-Encoding: zstd'), 'packed as zstd'),
], ids=lambda value: value[-24:].decode('latin-1') if isinstance(value, bytes) else value)
def test_what_is_not_whole_is_broken_and_its_connection_ended(run, reply, said, monkeypatch):
    monkeypatch.setattr(wire, 'MOST', 200_000)
    async def answer(writer, number, request):
        writer.write(reply if number == 1 else WHOLE)
        return 'end' if said.endswith('the reply') and number == 1 else None
    async def main():
        async with serving(answer) as server, open_line(server.url, {}, PATIENCE) as line:
            return await outcome(line), await outcome(line), [len(one) for one in server.connections]
    error, again, connections = run(main())
    assert type(error) is Broken and said in str(error), error
    assert again == BODY and (connections == [1, 1] or 'pack' in said or said in ('more than', 'not whole')), connections


def test_a_reset_inside_the_body_is_broken(run):
    async def answer(writer, number, request):
        if number > 1: return writer.write(WHOLE)
        writer.write(WHOLE[:-3])
        await writer.drain()
        writer.transport.get_extra_info('socket').setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
        writer.transport.abort()
    async def main():
        async with serving(answer) as server, open_line(server.url, {}, PATIENCE) as line: return await outcome(line), await outcome(line)
    error, again = run(main())
    assert type(error) is Broken and again == BODY, error


def test_an_endless_reply_is_ended_in_little_memory(run, monkeypatch):
    monkeypatch.setattr(wire, 'MOST', 2_000_000)
    async def answer(writer, number, request):
        writer.write(OK + b'\r\n')
        for sent in range(1000):
            writer.write(b'x' * 100_000)
            await writer.drain()
            answer.sent = sent
    async def main():
        async with serving(answer) as server, open_line(server.url, {}, PATIENCE) as line: return await outcome(line)
    error = run(main())
    assert type(error) is Broken and 'too long' in str(error) and answer.sent < 900

# Time


@pytest.mark.parametrize('phase, way', [*((phase, way) for phase in ('connect', 'handshake', 'reply', 'body') for way in ('late', 'cancelled')),
                                        ('reply', 'closed'), ('body', 'closed')])
def test_a_call_that_is_given_up_leaves_no_connection(run, phase, way):
    "Too late, cancelled, or its line closed meanwhile: the other side sees the connection's end."
    async def main():
        async with serving(replying(OK + b'Content-Length: 9\r\n\r\n1' if phase == 'body' else b'')) as server, deaf() as unheard:
            url = f'http://127.0.0.1:{unheard}/v1' if phase == 'connect' else server.url
            async with open_line(url.replace('http:', 'https:') if phase == 'handshake' else url, {}, PATIENCE) as line:
                call = asyncio.ensure_future(outcome(line))
                while not reached(phase, line, server, unheard): await asyncio.sleep(0.001)
                if way == 'late': line.deadlines.running[call] = 0.0 # Its time is over
                elif way == 'cancelled': call.cancel()
                else: line.close()
                given_up, = await asyncio.gather(call, return_exceptions=True)
                while server.ended < len(server.connections) or sockets_to(unheard) > CALLERS: await asyncio.sleep(0.01)
                return type(given_up), line.idle
    assert run(main()) == ({'late': asyncio.TimeoutError, 'cancelled': asyncio.CancelledError, 'closed': Broken}[way], [])


def reached(phase, line, server, unheard):
    "Tell whether the one call under way has come so far."
    if phase == 'connect': return sockets_to(unheard) > CALLERS
    if phase == 'handshake': return server.connections
    return server.connections and server.connections[0] and (phase == 'reply' or any(one.body for one in line.made))


def sockets_to(port): return sum(bool(one.raddr) and one.raddr.port == port for one in psutil.Process().net_connections('tcp'))


CALLERS = 4 # That fill a queue of one


@asynccontextmanager
async def deaf():
    "Give a port whose queue is full: nobody answers there, not even no."
    with socket.create_server(('127.0.0.1', 0), backlog=0) as listener:
        port, callers = listener.getsockname()[1], []
        try:
            for _ in range(CALLERS):
                callers.append(socket.socket())
                callers[-1].setblocking(False)
                callers[-1].connect_ex(('127.0.0.1', port))
            yield port
        finally:
            for one in callers: one.close()


def test_a_connection_that_was_idle_for_long_is_not_used_again(run):
    async def main():
        async with serving(replying(WHOLE)) as server, open_line(server.url, {}, PATIENCE) as line:
            got = [await outcome(line), await outcome(line)]
            line.idle[0].since -= wire.IDLE
            return [*got, await outcome(line)], [len(one) for one in server.connections]
    assert run(main()) == ([BODY] * 3, [2, 1])


def test_a_server_that_closes_idle_connections_costs_nothing(run):
    "It says nothing beforehand; the next call takes a new connection."
    async def answer(writer, number, request):
        writer.write(WHOLE)
        return 'end'
    async def main():
        async with serving(answer) as server, open_line(server.url, {}, PATIENCE) as line:
            got = []
            for _ in range(20):
                got.append(await outcome(line))
                while server.ended < len(got) or any(one.open for one in line.idle): await asyncio.sleep(0.001)
            return got, [len(one) for one in server.connections]
    assert run(main()) == ([BODY] * 20, [1] * 20)


def test_nothing_is_sent_twice_when_a_kept_connection_breaks(run):
    "What was sent may be paid; only the engine, which counts, may send it again."
    async def answer(writer, number, request):
        if number == 2: return 'end'
        writer.write(WHOLE)
    async def main():
        async with serving(answer) as server, open_line(server.url, {}, PATIENCE) as line:
            return [await outcome(line, b'%d' % number) for number in range(3)], server.connections
    (first, broken, third), connections = run(main())
    assert (first, third, type(broken)) == (BODY, BODY, Broken)
    assert [request[-1:] for one in connections for request in one] == [b'0', b'1', b'2']

# Where it goes


def certificate(folder, *names):
    "Make a key and a certificate that signs itself; give a server's context and the file."
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(timezone.utc)
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, 'kyara test')])
    places = [x509.IPAddress(ipaddress.ip_address(name)) if name[0].isdigit() else x509.DNSName(name) for name in names]
    made = (x509.CertificateBuilder().subject_name(who).issuer_name(who).public_key(key.public_key()).serial_number(1)
            .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName(places), False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), True).sign(key, hashes.SHA256()))
    plain = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file = folder / 'certificate.pem'
    file.write_bytes(plain + made.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context, file


@pytest.mark.parametrize('names, trusted, said', [(['127.0.0.1', 'localhost'], True, ''), (['127.0.0.1'], False, 'self-signed|self signed'),
                                                  (['models.example'], True, 'mismatch|not valid for')], ids=['good', 'unknown', 'of_another'])
def test_tls_verifies_who_answers_before_anything_is_sent(run, names, trusted, said, tmp_path, monkeypatch):
    context, file = certificate(tmp_path, *names)
    if trusted: monkeypatch.setenv('SSL_CERT_FILE', str(file))
    async def main():
        async with serving(replying(WHOLE, CHUNKS, pause=0.001), certificate=context) as server:
            async with open_line(server.url.replace('http', 'https'), {'Authorization': 'Bearer sk-secret'}, PATIENCE) as line:
                return [await outcome(line) for _ in range(3)], server.connections
    got, connections = run(main())
    if not said: assert got == [BODY] * 3 and [len(one) for one in connections] == [3]
    else:
        assert all(type(error) is Unreachable for error in got) and not sum(connections, []), got
        assert 'its certificate is not trusted' in str(got[0]) and any(word in str(got[0]) for word in said.split('|')), got[0]


def test_a_server_that_speaks_no_tls_is_unreachable(run):
    async def plain(reader, writer):
        writer.write(WHOLE)
        writer.close()
    async def main():
        async with await asyncio.start_server(plain, '127.0.0.1', 0) as server:
            async with open_line(f'https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1', {}, PATIENCE) as line: return await outcome(line)
    assert type(run(main())) is Unreachable


@pytest.mark.parametrize('status', [301, 302, 303, 307, 308])
def test_a_redirect_takes_the_key_nowhere(run, status, monkeypatch):
    monkeypatch.setenv('WIRE_KEY', 'sk-secret')
    async def main():
        async with serving(replying(WHOLE)) as elsewhere:
            moved = b'HTTP/1.1 %d Moved\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n' % (status, elsewhere.url.encode())
            async with serving(replying(moved)) as server:
                settings = ModelSettings('m', 'openai', 'm', server.url.removesuffix('/chat/completions'), 'WIRE_KEY')
                async with open_openai(settings) as send:
                    with pytest.raises(Refused, match='moved to') as caught: await send(Request([{'role': 'user', 'content': '玉山'}]))
                return elsewhere.connections, server.connections, str(caught.value)
    nowhere, connections, said = run(main())
    assert nowhere == [] and b'Bearer sk-secret' in connections[0][0] and 'sk-secret' not in said


def test_a_name_with_two_addresses_is_reached_at_the_one_that_answers(run):
    "localhost is often ::1 first, and the server listens on 127.0.0.1 alone; one look-up does for all."
    async def main():
        async with serving(replying(WHOLE, pause=0.01)) as server, open_line(server.url.replace('127.0.0.1', 'localhost'), {}, PATIENCE) as line:
            got = await asyncio.gather(*(outcome(line) for _ in range(20)))
            return got, line.lookup.done(), len(server.connections)
    got, looked_up, connections = run(main())
    assert got == [BODY] * 20 and looked_up and connections <= 20


def test_ipv6(run):
    try: socket.create_server(('::1', 0), family=socket.AF_INET6).close()
    except OSError: pytest.skip('no IPv6 on this machine')
    async def main():
        async with serving(replying(WHOLE), host='::1') as server, open_line(f'http://[::1]:{server.port}/v1', {}, PATIENCE) as line: return await outcome(line)
    assert run(main()) == BODY


def test_nobody_there_is_unreachable_and_asked_again_each_time(run):
    async def main():
        async with open_line('http://kyara.invalid/v1', {}, PATIENCE) as line: first = [await outcome(line), await outcome(line)]
        with absent() as url:
            async with open_line(url, {}, PATIENCE) as line: return [*first, await outcome(line), url]
    *got, url = run(main())
    assert all(type(error) is Unreachable for error in got) and 'kyara.invalid' in str(got[0]) and url[7:-3] in str(got[2]), got


@contextmanager
def absent():
    "Give an address that is taken, where nobody listens."
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        yield f'http://127.0.0.1:{taken.getsockname()[1]}/v1'


def test_of_several_addresses_those_that_are_dead_cost_a_moment_only(run):
    "One says nothing, one says no; the third answers."
    async def main():
        async with serving(replying(WHOLE)) as server, deaf() as unheard, open_line('http://models.example/v1', {}, PATIENCE) as line:
            with absent() as url:
                ports = unheard, int(url[17:-3]), server.port
                line.lookup, line.stale = asyncio.get_running_loop().create_future(), float('inf')
                line.lookup.set_result([(socket.AF_INET, socket.SOCK_STREAM, 6, '', ('127.0.0.1', port)) for port in ports])
                return await outcome(line), sockets_to(unheard)
    assert run(main()) == (BODY, CALLERS)


def test_through_a_proxy_the_same_holds(run, monkeypatch):
    "aiohttp speaks to it; lengths, names of failures, limits and redirects are as without."
    monkeypatch.setattr(wire, 'MOST', 200_000)
    replies = [WHOLE, with_length(gzip.compress(BODY), b'Content-Encoding: gzip'), with_length(gzip.compress(b'x' * 300_000), b'Content-Encoding: gzip'),
               b'HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n', WHOLE[:-1]]
    async def answer(writer, number, request):
        writer.write(replies[number - 1])
        return 'end' if number == 5 else None
    async def main():
        async with serving(answer) as proxy:
            monkeypatch.setenv('http_proxy', f'http://127.0.0.1:{proxy.port}')
            async with open_line('http://models.example/v1', {'Authorization': 'Bearer sk-secret'}, PATIENCE) as line:
                got = [await outcome(line) for _ in range(3)], (await line.post(b'{}')).status, await outcome(line)
            with absent() as url:
                monkeypatch.setenv('http_proxy', url)
                async with open_line('http://models.example/v1', {}, PATIENCE) as line: return *got, await outcome(line), sum(proxy.connections, [])
    (whole, unpacked, long), status, broken, nobody, requests = run(main())
    assert (whole, unpacked, status) == (BODY, BODY, 307) and len(requests) == 5
    assert type(long) is Broken and 'too long' in str(long) and type(broken) is Broken and type(nobody) is Unreachable
    assert all(request.startswith(b'POST http://models.example/v1 ') for request in requests)


def test_a_proxy_that_wants_a_password_is_told_from_the_service_and_keeps_its_own(run, monkeypatch):
    async def refuse(reader, writer):
        heard.append(await reader.readuntil(b'\r\n\r\n'))
        writer.write(b'HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n')
        writer.close()
    async def main():
        async with await asyncio.start_server(refuse, '127.0.0.1', 0) as proxy:
            monkeypatch.setenv('https_proxy', f'http://user:sk-planted@127.0.0.1:{proxy.sockets[0].getsockname()[1]}')
            async with open_line('https://models.example/v1', {'Authorization': 'Bearer sk-secret'}, PATIENCE) as line: return await outcome(line)
    heard = []
    error = run(main())
    assert type(error) is Unreachable and '407' in str(error) and 'sk-planted' not in str(error), error
    assert heard[0].startswith(b'CONNECT models.example:443 ') and b'sk-secret' not in b''.join(heard)


@pytest.mark.parametrize('key', ['sk-1\r\nX-Evil: yes', 'sk-鑰匙'], ids=['lines', 'letters'])
def test_a_key_cannot_write_headers(run, key, monkeypatch):
    monkeypatch.setenv('WIRE_KEY', key)
    async def main():
        async with open_openai(ModelSettings('m', 'openai', 'm', 'http://127.0.0.1:9/v1', 'WIRE_KEY')): pass
    with pytest.raises(UserError, match='WIRE_KEY') as caught: run(main())
    assert key not in str(caught.value)
