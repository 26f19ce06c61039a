"The ledger when processes are killed, disks are full, folders are read-only and files are damaged."
import itertools, json, os, random, resource, shutil, signal, sqlite3, subprocess, sys, tempfile
from contextlib import closing
from pathlib import Path

import pytest

from kyara.core import UserError, content_hash
from kyara.ledger import PAGE, DamagedLedger, Entry, Ledger, Pages, fitting_row, leaf_rows, recover_ledger, rescue, row_payload, verify_ledger

TEXT = '玉山主峰海拔三千九百五十二公尺，是臺灣最高的山。'

def entry(number, text=TEXT, **more):
    request = {'messages': [{'role': 'user', 'content': f'第{number}高的山有多高？'}]}
    return Entry(content_hash(number, 64), 'openai', 'qwen3-32b', request, text, raw=json.dumps({'text': text}), **more)

def child(code, *arguments, **more):
    "Start another process."
    code = 'import os, sys, json\nfrom kyara.core import *\nfrom kyara.ledger import *\nsys.path.insert(0, sys.argv[1])\n' \
           f'from test_ledger import *\n{code}'
    command = [sys.executable, '-c', code, str(Path(__file__).parent), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **more)

def finish(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, process.returncode
    return out

def one_line(failure): return '\n' not in str(failure.value) and str(failure.value)

# Processes

WRITE_FOR_EVER = '''
ledger = Ledger(sys.argv[2])
for start in range(0, 10**9, 50):
    ledger.put_many([entry(number, TEXT * (number % 9)) for number in range(start, start + 50)])
    print(start + 50, flush=True)
'''

@pytest.mark.parametrize('batches', [1, 7, 40])
def test_killed_writer_loses_nothing_it_was_told_is_kept(tmp_path, batches):
    process = child(WRITE_FOR_EVER, tmp_path / 'ledger.sqlite')
    for _ in range(batches): kept = int(process.stdout.readline())
    process.kill()
    kept = int((process.communicate()[0].split() or [kept])[-1])
    assert process.returncode == -signal.SIGKILL
    assert verify_ledger(tmp_path / 'ledger.sqlite') == []
    with Ledger(tmp_path / 'ledger.sqlite') as ledger:
        assert len(ledger.get_many([entry(number).call_id for number in range(kept)])) == kept
        assert len(list(ledger.entries())) in (kept, kept + 50)

WRITE_SOME = '''
ledger, first, last = Ledger(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
numbers = list(range(first, last))
random.Random(first).shuffle(numbers)
print(sum(ledger.put_many([entry(number, TEXT + sys.argv[3]) for number in numbers[start:start + 20]])
          for start in range(0, len(numbers), 20)))
'''

def test_two_processes_write_the_same_new_ledger(tmp_path):
    place = tmp_path / 'new' / 'ledger.sqlite'
    ranges = [(0, 1200), (800, 2000), (400, 1600)]
    counts = [int(finish(process)) for process in [child(WRITE_SOME, place, *each) for each in ranges]]
    assert sum(counts) == 2000 and verify_ledger(place) == []
    with Ledger(place) as ledger:
        kept = {entry.call_id: entry.text for entry in ledger.entries()}
        assert len(kept) == len(list(ledger.entries())) == 2000
        assert ledger._select('select count(*), count(distinct call_id) from calls') == [(2000, 2000)]
    assert all(kept[entry(number).call_id] == TEXT + '0' for number in range(400))

def test_a_ledger_that_another_process_is_just_making(tmp_path):
    "A database that is still empty belongs to nobody; one with a table of its own, or a mark, is foreign."
    making = sqlite3.connect(tmp_path / 'ledger.sqlite')
    making.execute('pragma journal_mode=wal')
    done = child(WRITE_SOME, tmp_path / 'ledger.sqlite', 0, 10)
    assert int(finish(done)) == 10
    making.close()
    for number, statement in enumerate(['create table mine (a)', 'pragma application_id=7']):
        with closing(sqlite3.connect(tmp_path / f'{number}.sqlite')) as other: other.execute(statement)
        with pytest.raises(UserError, match='another kind'): Ledger(tmp_path / f'{number}.sqlite')

CLAIM = '''
ledger = Ledger(sys.argv[2])
for line in sys.stdin:
    action, number = line.split()
    call_id = entry(int(number)).call_id
    print(ledger.claim(call_id) if action == 'claim' else ledger.release([call_id]), flush=True)
'''

def say(process, line):
    print(line, file=process.stdin, flush=True)
    return process.stdout.readline().strip()

def test_claims_across_processes_end_with_their_holder(tmp_path):
    holder, other = [child(CLAIM, tmp_path / 'ledger.sqlite') for _ in range(2)]
    assert say(holder, 'claim 1') == 'True' and say(holder, 'claim 1') == 'False'
    assert say(other, 'claim 1') == 'False' and say(other, 'claim 2') == 'True'
    assert say(other, 'release 1') == 'None' and say(other, 'claim 1') == 'False' # another's claim cannot be released
    assert say(holder, 'claim 3') == 'True' and say(holder, 'release 3') == 'None' and say(other, 'claim 3') == 'True'
    holder.kill()
    holder.communicate()
    assert say(other, 'claim 1') == 'True'
    other.communicate()

def test_claims_survive_the_closing_of_another_ledger_object(tmp_path):
    "The kernel drops a process's locks when any descriptor of the file is closed."
    with Ledger(tmp_path / 'ledger.sqlite') as ledger:
        assert ledger.claim(entry(1).call_id)
        with Ledger(tmp_path / '..' / tmp_path.name / 'ledger.sqlite') as again: assert not again.claim(entry(1).call_id)
        other = child(CLAIM, tmp_path / 'ledger.sqlite')
        assert say(other, 'claim 1') == 'False'
        ledger.release([entry(1).call_id])
        assert say(other, 'claim 1') == 'True' and not ledger.claim(entry(1).call_id)
        other.communicate()

# Places that cannot be written

FILL = '''
with Ledger(sys.argv[2]) as ledger:
    try:
        for number in range(10**6):
            ledger.put_many([entry(number, TEXT * 50)])
            print(number, flush=True)
    except UserError as error: print(error, file=sys.stderr)
'''

@pytest.fixture
def small_disk(tmp_path):
    "A disk of two megabytes, or else a limit to the size of files."
    folder = tmp_path / 'disk'
    folder.mkdir()
    mounted = shutil.which('mount') and os.geteuid() == 0 and subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(folder)], capture_output=True).returncode == 0
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 2**20, 2 * 2**20))
    yield folder, None if mounted else limit
    if mounted: subprocess.run(['umount', str(folder)], check=True)

def test_full_disk_is_one_line_and_what_was_kept_stays(small_disk):
    folder, limit = small_disk
    process = child(FILL, folder / 'ledger.sqlite', stderr=subprocess.PIPE, preexec_fn=limit)
    out, error = process.communicate(timeout=300)
    kept = [int(line) for line in out.split()]
    assert process.returncode == 0 and len(kept) > 20, (process.returncode, error)
    assert error.count('\n') == 1 and 'cannot be written' in error and 'make room' in error, error
    assert verify_ledger(folder / 'ledger.sqlite') == []
    with Ledger(folder / 'ledger.sqlite', read_only=True) as ledger:
        assert len(ledger.get_many([entry(number).call_id for number in kept])) == len(kept)

@pytest.fixture
def open_folder():
    "A folder that every user may enter."
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)
        os.chmod(folder, 0o755)

READ_AS_NOBODY = '''
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
with Ledger(sys.argv[2]) as ledger:
    print(json.dumps([ledger.read_only, len(list(ledger.entries())), ledger.stats()[0]['calls'], ledger.claim('a' * 64)]))
    try: ledger.put_many([entry(1)])
    except UserError as error: print(error)
'''

@pytest.mark.parametrize('killed', [False, True], ids=['closed', 'killed'])
def test_read_only_folder_can_be_read(open_folder, killed):
    end = 'os.kill(os.getpid(), 9)' if killed else 'ledger.close()'
    child(f'ledger = Ledger(sys.argv[2])\nledger.put_many([entry(number) for number in range(9)])\n{end}',
          open_folder / 'ledger.sqlite').communicate()
    for path in open_folder.iterdir(): path.chmod(0o444)
    open_folder.chmod(0o555)
    before = {path.name: path.read_bytes() for path in open_folder.iterdir() if not path.name.endswith('-shm')}
    state, refusal = finish(child(READ_AS_NOBODY, open_folder / 'ledger.sqlite')).splitlines()
    assert json.loads(state) == [True, 9, 9, True] and 'can only be read' in refusal
    assert {path.name: path.read_bytes() for path in open_folder.iterdir() if not path.name.endswith('-shm')} == before

def test_new_ledger_in_a_read_only_folder_is_refused(open_folder):
    open_folder.chmod(0o555)
    code = READ_AS_NOBODY.replace('with Ledger', 'try: Ledger(sys.argv[2])\nexcept UserError as error: print(error)\nsys.exit()\nwith Ledger')
    line, = finish(child(code, open_folder / 'ledger.sqlite')).splitlines()
    assert 'cannot be opened' in line and 'another file' in line

# Files that are something else

def foreign(path, mode='delete', mark=0):
    "Make a database of somebody else's."
    with closing(sqlite3.connect(path)) as music:
        music.executescript(f'pragma journal_mode={mode}; pragma application_id={mark}; create table calls (title, year);')
    return path

@pytest.mark.parametrize('read_only', [False, True], ids=['write', 'read'])
@pytest.mark.parametrize('kind', ['text', 'database', 'wal', 'marked'])
def test_foreign_file_is_refused_untouched(tmp_path, kind, read_only):
    path = tmp_path / 'music.sqlite'
    if kind == 'text': path.write_text('這不是資料庫。\n' * 100)
    else: foreign(path, 'wal' if kind == 'wal' else 'delete', 7 if kind == 'marked' else 0)
    before = path.read_bytes(), path.stat().st_mtime_ns
    with pytest.raises(UserError, match='no ledger') as failure: Ledger(path, read_only)
    assert one_line(failure)
    if kind != 'text':
        with pytest.raises(UserError, match='no ledger'): verify_ledger(path)
    with pytest.raises(UserError, match='no whole entry'): rescue(path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before and os.listdir(tmp_path) == [path.name]

def test_folder_and_missing_file_are_refused(tmp_path):
    with pytest.raises(UserError, match='not a file'): Ledger(tmp_path)
    with pytest.raises(UserError, match='there is no ledger'): Ledger(tmp_path / 'none.sqlite', read_only=True)
    with pytest.raises(UserError, match='cannot be opened'): Ledger(__file__ + '/ledger.sqlite')
    assert os.listdir(tmp_path) == []

def test_ledger_without_mark_and_in_the_first_form_still_opens(tmp_path):
    path = tmp_path / 'old.sqlite'
    columns = [name for name in vars(entry(1))] + ['checksum']
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        old.execute(f'create table calls ({", ".join(columns)}, primary key (call_id))')
        for number in range(30):
            values = {**vars(entry(number)), 'request': json.dumps(entry(number).request), 'checksum': 5}
            old.execute(f'insert into calls values ({", ".join("?" * 17)})', list(values.values()))
    with pytest.raises(UserError, match='older form'): Ledger(path, read_only=True)
    with Ledger(path) as ledger:
        assert list(ledger.entries()) == [entry(number) for number in range(30)] and ledger.verify() == []
    with pytest.raises(UserError, match='newer'):
        with closing(sqlite3.connect(path)) as newer: newer.execute('pragma user_version=99')
        Ledger(path)

# Damage

SIZES = [1, 1, 1, 2, 5, 20, 60, 150, 400] # times TEXT: most fit a page, some need many

@pytest.fixture(scope='module')
def intact(tmp_path_factory):
    "A ledger of 2,000 entries of mixed sizes, the last of them only in the write-ahead log, as after a kill."
    folder = tmp_path_factory.mktemp('intact')
    pick = random.Random(7)
    entries = [entry(number, TEXT * pick.choice(SIZES), cost=number / 7, time=float(number)) for number in range(2000)]
    with Ledger(folder / 'ledger.sqlite') as ledger:
        for start in range(0, 1600, 40): ledger.put_many(entries[start:start + 40])
    ledger = Ledger(folder / 'ledger.sqlite')
    for start in range(1600, 2000, 40): ledger.put_many(entries[start:start + 40])
    for suffix in ('', '-wal'): shutil.copy(f'{ledger.path}{suffix}', folder / f'copy.sqlite{suffix}')
    ledger.close()
    return folder / 'copy.sqlite', entries

def copy_of(path, folder):
    "Copy a ledger with its log."
    for suffix in ('', '-wal'): shutil.copy(f'{path}{suffix}', folder / f'torn.sqlite{suffix}')
    return folder / 'torn.sqlite'

class Watched(Pages):
    "Notes which places of file and log were read."
    def page(self, number, view):
        logged = number in self.views[view]
        self.seen.add(('log', (self.views[view][number] - 24 - 32) // (PAGE + 24)) if logged else ('file', number - 1))
        return super().page(number, view)

    def places(self):
        yield from (('log', (start - 56) // (PAGE + 24)) for _, start in self.committed)
        yield from (('file', index) for index in range(len(self.file) // PAGE))
        yield from (('log', (start - 56) // (PAGE + 24)) for _, start in self.others)

def places_of(path):
    "Give, by call id, every set of places from which the entry can be read."
    pages, found = Watched(path), {}
    for place, image in zip(pages.places(), pages.images()):
        for (_, size, here), view in itertools.product(leaf_rows(image), range(3)):
            pages.seen = {place}
            if row := fitting_row(row_payload(pages, size, here, view)): found.setdefault(row[0], []).append(pages.seen)
    return found

def test_undamaged_ledger_is_read_whole_without_sqlite(intact):
    path, entries = intact
    found, places = saved(path, path.parent), places_of(path)
    assert list(found.values()) == entries and found.keys() == places.keys()
    expected = lambda kept: 1 + max(0, len(kept.text.encode()) * 2 - 4000) // 4092
    assert all(len(places[kept.call_id][0]) >= expected(kept) for kept in entries)
    assert {kind for sets in places.values() for kind, _ in sets[0]} == {'file', 'log'}

def saved(path, folder):
    "Recover a ledger; give its entries."
    out = folder / 'out.sqlite'
    out.unlink(missing_ok=True)
    count = recover_ledger(path, out)
    with Ledger(out) as ledger:
        found = {entry.call_id: entry for entry in ledger.entries()}
        assert len(found) == count and ledger.verify() == []
    return found

def damage(path, pick):
    "Hurt file and log at random; give the places that were touched."
    touched, sizes = set(), {'file': (path, 0, PAGE), 'log': (Path(f'{path}-wal'), 32, PAGE + 24)}
    for kind, (place, start, size) in sizes.items():
        content = bytearray(place.read_bytes())
        count = (len(content) - start) // size
        for _ in range(pick.choice([1, 3, 30])):
            index = pick.randrange(count)
            at, hurt = start + index * size, pick.choice(['zero', 'flip', 'noise', 'swap', 'cut'])
            touched.add((kind, index))
            if hurt == 'zero': content[at:at + size] = bytes(size)
            if hurt == 'flip': content[at + pick.randrange(size)] ^= 1 << pick.randrange(8)
            if hurt == 'noise': content[at + 100:at + 600] = pick.randbytes(500)
            if hurt == 'swap':
                other = pick.randrange(count)
                touched.add((kind, other))
                there = start + other * size
                content[at:at + size], content[there:there + size] = content[there:there + size], content[at:at + size]
            if hurt == 'cut' and pick.random() < 0.2:
                del content[at + pick.randrange(size):]
                touched |= {(kind, later) for later in range(index, count)}
                count = index
                if not count: break
        place.write_bytes(content)
    return touched

@pytest.fixture(scope='module')
def places(intact): return places_of(intact[0])

@pytest.mark.parametrize('seed', range(12))
def test_every_entry_on_untouched_pages_is_saved_and_nothing_wrong(intact, places, tmp_path, seed):
    path, entries = copy_of(intact[0], tmp_path), {kept.call_id: kept for kept in intact[1]}
    touched = damage(path, random.Random(seed))
    before = path.read_bytes(), Path(f'{path}-wal').read_bytes()
    found = saved(path, tmp_path)
    assert not [kept for kept in found.values() if kept != entries[kept.call_id]]
    untouched = {call_id for call_id, ways in places.items() if any(not way & touched for way in ways)}
    assert untouched <= found.keys(), len(untouched - found.keys())
    assert (path.read_bytes(), Path(f'{path}-wal').read_bytes()) == before
    torn_off = len(before[1]) < Path(f'{intact[0]}-wal').stat().st_size # looks as after a crash while writing
    if len(found) < 2000 and not torn_off: assert verify_ledger(path) != []

def pages_that(path, *kinds):
    "Give the places of pages that begin with one of `kinds` bytes."
    content = path.read_bytes()
    return [start for start in range(0, len(content), PAGE) if content[start] in kinds]

def overwrite(path, start, data):
    with open(path, 'r+b') as file:
        file.seek(start)
        file.write(data)

@pytest.fixture
def closed(intact, tmp_path):
    "A copy of the ledger after an orderly end: all in one file."
    path = copy_of(intact[0], tmp_path)
    Ledger(path).close()
    assert os.listdir(tmp_path) == [path.name] and verify_ledger(path) == []
    return path

def test_all_is_saved_when_only_leaves_are_left(closed, intact):
    for start in [0, *pages_that(closed, 2, 5, 10)]: overwrite(closed, start, bytes(PAGE))
    out, count = rescue(closed)
    assert (out.name, count) == ('torn.recovered.sqlite', 2000) and rescue(closed)[0].name == 'torn.recovered-2.sqlite'
    with Ledger(out) as ledger: assert list(ledger.entries()) == intact[1]

def test_all_is_saved_when_the_log_is_hurt_where_sqlite_would_end(intact, tmp_path):
    path = copy_of(intact[0], tmp_path)
    overwrite(f'{path}-wal', 32 + 16, b'12345678')
    finding, = verify_ledger(path)
    assert finding.startswith('damaged write-ahead log')
    assert list(saved(path, tmp_path).values()) == intact[1]

@pytest.mark.parametrize('cut', [3, PAGE, 5 * PAGE + 7])
def test_torn_end_of_the_log_is_healed(intact, tmp_path, cut):
    path = copy_of(intact[0], tmp_path)
    os.truncate(f'{path}-wal', Path(f'{path}-wal').stat().st_size - cut)
    assert verify_ledger(path) == []
    with Ledger(path) as ledger: assert list(ledger.entries()) == intact[1][:1960]
    assert verify_ledger(path) == []

HURTS = {
    'no header': lambda path: overwrite(path, 0, bytes(PAGE)),
    'noise in header': lambda path: overwrite(path, 18, bytes(range(90))),
    'truncated': lambda path: os.truncate(path, path.stat().st_size // 3),
    'cut in a page': lambda path: os.truncate(path, path.stat().st_size - 99),
    'zeroed leaf': lambda path: overwrite(path, pages_that(path, 13)[5], bytes(PAGE)),
    'zeroed root': lambda path: overwrite(path, PAGE, bytes(PAGE)),
    'zeroed index': lambda path: overwrite(path, pages_that(path, 10)[5], bytes(PAGE)),
    'missing in index': lambda path: overwrite(path, pages_that(path, 10)[5] + 4, b'\5'),
    'flipped in index': lambda path: flip(path, pages_that(path, 10)[5] + PAGE - 9),
    'flipped in a row': lambda path: flip(path, pages_that(path, 13)[5] + PAGE - 9),
    'flipped in a text': lambda path: flip(path, path.read_bytes().rfind('海拔'.encode())),
}

def flip(path, place): overwrite(path, place, bytes([path.read_bytes()[place] ^ 64]))

@pytest.mark.parametrize('hurt', HURTS)
def test_damage_is_found_and_said_in_one_line(closed, intact, hurt):
    HURTS[hurt](closed)
    findings = verify_ledger(closed)
    assert findings and not [finding for finding in findings if '\n' in finding]
    def use():
        with Ledger(closed) as ledger: # what ask, export and stats do
            ledger.get_many([entry(number).call_id for number in range(2000)], whole=False)
            assert len(list(ledger.entries())) + ledger._select('select count(call_id) from calls')[0][0] == 4000
    if 'in index' not in hurt:
        with pytest.raises(DamagedLedger, match='kyara ledger verify') as failure: use()
        assert one_line(failure)
    assert rescue(closed)[1] >= (1990 if 'truncated' not in hurt else 400)

def test_every_column_is_covered_by_the_checksum(tmp_path):
    path = tmp_path / 'ledger.sqlite'
    numbers = {name: number for number, name in enumerate(vars(entry(1)))}
    with Ledger(path) as ledger:
        ledger.put_many([entry(number, cost=0.5, stage='synthesis', run='demo') for number in range(30)])
        for name, number in numbers.items():
            ledger._write(f"update calls set {name} = replace({name}, substr({name}, 1, 1), '7') || '1' where call_id = ?",
                          [(entry(number).call_id,)])
        assert len(ledger.verify()) == len(numbers) == 16
        for name, number in list(numbers.items())[1:]:
            with pytest.raises(DamagedLedger): ledger.get_many([entry(number).call_id])
            if name not in ('request', 'raw'):
                with pytest.raises(DamagedLedger): ledger.get_many([entry(number).call_id], whole=False)
    assert rescue(path)[1] == 14

def test_many_findings_are_counted_not_listed(tmp_path):
    with Ledger(tmp_path / 'ledger.sqlite') as ledger:
        ledger.put_many([entry(number) for number in range(500)])
        ledger._write("update calls set text = 'x'", [()])
        assert ledger.verify()[-1] == 'and 480 more damaged entries' and len(ledger.verify()) == 21

# Ten million entries

def test_lookups_use_the_index(tmp_path):
    with Ledger(tmp_path / 'ledger.sqlite') as ledger:
        ledger.put_many([entry(1)])
        plans = []
        ledger._reader.set_trace_callback(plans.append)
        ledger.get_many([entry(1).call_id, entry(2).call_id], whole=False)
        ledger._reader.set_trace_callback(None)
        (*_, plan), = ledger._select(f'explain query plan {plans[0]}')
        assert plan == 'SEARCH calls USING INDEX sqlite_autoindex_calls_1 (call_id=?)', plan

def test_what_is_strange_comes_back(tmp_path):
    strange = [entry(1, 'a\0b\x1f\r\n\u2028'), entry(2, ''), entry(3, '𠮷野家' * 9000, cost=1e-9, time=1.0), entry(4, model_version='x' * 9000)]
    with Ledger(tmp_path / 'a?b #%20.sqlite') as ledger:
        assert ledger.put_many(strange + strange) == 4 and ledger.put_many([]) == 0 and ledger.get_many([]) == {}
        ledger.put_many([entry(5, '半\ud842字', input_tokens=None, cost=0)])
        assert ledger.get_many([entry(5).call_id])[entry(5).call_id].text == '半?字'
        assert list(ledger.entries())[:4] == strange and ledger.verify() == []
    assert recover_ledger(ledger.path, tmp_path / 'out.sqlite') == 5
