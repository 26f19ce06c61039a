"The scoring rules against published outputs and figures; the data are not part of the project."
import csv
import gzip
import json
import random
import re
from pathlib import Path

import pytest

from kyara.core import UserError
from kyara.score import read_outputs, score_file, score_rows
from kyara.metrics import (aggregate_alignbench, aggregate_tmmluplus, alignbench_score, arena_verdict, judge_pair, same_number,
                           token_preference)

DATA = Path(__file__).parent.parent.parent/'shared'/'data'
EXPECTED = json.loads((DATA/'expected.json').read_text()) if (DATA/'expected.json').exists() else None
needs_data = pytest.mark.skipif(EXPECTED is None, reason=f'no public benchmark cases at {DATA}')
PRINTED = 0.0051 # Published figures have two digits

def table(path):
    opener = gzip.open if path.suffix == '.gz' else open
    with opener(path, 'rt', encoding='utf-8') as lines: return list(csv.DictReader(lines))

def items(benchmark, path):
    return score_rows(benchmark, read_outputs(path), model=path.name, partial=True)[1]

@needs_data
@pytest.mark.parametrize('name', ['Llama-3.1-405B-Inst@hyperbolic.partial51', 'Qwen2-72B-Instruct.first376'])
def test_mmlu_redux_outputs(name):
    path = DATA/f'zeroeval/mmlu-redux/{name}.jsonl.gz'
    got = score_file('mmlu-redux', path)
    assert got['details']['partial'] and got['total'] == EXPECTED['mmlu_redux_outputs'][name]['n']
    flags = [row['published_correct'] for row in read_outputs(path) if 'published_correct' in row]
    assert [int(item['correct']) for item in items('mmlu-redux', path)][:len(flags)] == flags
    assert len(flags) == (got['total'] if name.startswith('Qwen') else 0) # The other file has none

@needs_data
def test_preferences_follow_from_the_probabilities_of_two_tokens():
    rows = [row for model in EXPECTED['alpaca_eval'] for row in read_outputs(DATA/f'alpaca_eval/annotations/{model}.csv.gz') if row['logprob_m'] and row['logprob_M']]
    for row in rows:
        both = [token_preference(float(row['logprob_m']), float(row['logprob_M']), shown) for shown in (True, False)] # The order shown is not public
        assert float(row['preference']) == pytest.approx(both[0], abs=1e-6) or float(row['preference']) == pytest.approx(both[1], abs=1e-6), row
    assert len(rows) > 4000

@needs_data
def test_mt_bench_single():
    path = DATA/'mt_bench/judgments/alvarobartt__FastChat.gpt-4_single.jsonl.gz'
    stored = [row['score'] for row in read_outputs(path)]
    assert [-1 if item['score'] is None else item['score'] for item in items('mt-bench', path)] == stored

@needs_data
def test_mt_bench_pairs():
    path = DATA/'mt_bench/judgments/Stefanstud__FastChat.gpt-4_pair.jsonl.gz'
    for row in read_outputs(path):
        first, second = judge_pair(row['g1_judgment']), judge_pair(row['g2_judgment'])
        assert {'A': 'model_1', 'B': 'model_2', 'C': 'tie', None: 'error'}[first] == row['g1_winner']
        assert {'A': 'model_2', 'B': 'model_1', 'C': 'tie', None: 'error'}[second] == row['g2_winner']

@needs_data
def test_arena_hard():
    path = DATA/'arena_hard/judgments_gemini15pro_phi3medium_7q.jsonl'
    games = [game for row in read_outputs(path) for game in row['games']]
    assert len(games) == 14 and all(arena_verdict(game['judgment']) == game['score'] for game in games)
    got = score_file('arena-hard', path)
    # One of the fourteen verdicts is strong and counts three battles.
    assert got['total'] == 7 and got['details']['phi-3-medium-4k-instruct']['battles'] == 16
    stats = DATA/'arena_hard/bootstrap_stats.jsonl.gz'
    details = score_file('arena-hard', stats)['details']
    for row in read_outputs(stats):
        figures = details[row['model']]
        assert (figures['score'], figures['lower'], figures['upper']) == pytest.approx((row['score'], row['lower'], row['upper']), abs=0.02)

@needs_data
def test_alignbench():
    path = DATA/'alignbench/leaderboard_v1.1.csv'
    rows, published = score_file('alignbench', path)['details']['rows'], table(path)
    assert len(rows) == EXPECTED['alignbench_rows']
    for got, want in zip(rows, published):
        for name in ('reasoning', 'language', 'overall'): assert got[name] == pytest.approx(float(want[name]), abs=0.0102)
    seeds = json.loads((DATA/'seeds_published_tables.json').read_text())
    for row in seeds['alignbench']:
        got = aggregate_alignbench(row['scores'])
        assert got['overall'] == pytest.approx(row['總分'], abs=0.0102), row['model']
        assert got['language'] == pytest.approx(row['語言總分'], abs=0.0102), row['model']
    for row in seeds['tmmluplus']:
        groups = [row[name] for name in ('STEM', 'Humanities', 'Other', 'Social-Science')]
        assert sum(groups) / 4 == pytest.approx(row['total'], abs=0.0102), row['model']

@needs_data
def test_tmmluplus_three_averages():
    (name, want), = EXPECTED['tmmluplus_lm_eval'].items()
    rows = table(DATA/f'tmmluplus/lm_eval_{name}.csv')
    accuracy, counts = ({row['subject']: kind(row[column]) for row in rows} for column, kind in (('acc', float), ('n', int)))
    got, harness = aggregate_tmmluplus(accuracy, 'weighted67', counts), want['rule_lm_eval_size_weighted']
    assert got['average'] == pytest.approx(harness['tmmluplus'], abs=1e-9)
    for group in ('STEM', 'humanities', 'social sciences', 'other'):
        assert got[group] == pytest.approx(harness[f"tmmluplus_{group.replace(' ', '_')}"], abs=1e-9)
    compare_groups(aggregate_tmmluplus(accuracy, 'macro4'), want['computed_here_rule_ikala_macro4_66_subjects'])
    assert aggregate_tmmluplus(accuracy, 'mean66')['average'] == pytest.approx(want['computed_here_rule_mean_of_66_subjects'], abs=1e-6)
    assert score_file('tmmluplus', DATA/f'tmmluplus/lm_eval_{name}.csv', 'weighted67')['score'] == pytest.approx(100 * harness['tmmluplus'])

@needs_data
def test_tmmluplus_leaderboard_and_sample():
    path, (want,) = DATA/'tmmluplus/leaderboard_per_subject.csv', EXPECTED['tmmluplus_leaderboard'].values()
    accuracy = {row['subject']: float(row['gpt-oss-20b']) for row in table(path)}
    compare_groups(aggregate_tmmluplus(accuracy, 'macro4'), want['computed_here_rule_ikala_macro4'])
    assert score_file('tmmluplus', path, 'mean66')['score'] == pytest.approx(100 * want['published_mean_of_66_subjects'], abs=1e-6)
    sample = score_file('tmmluplus', DATA/'tmmluplus/sample_questions_12.jsonl')
    assert (sample['details']['correct'], sample['total'], sample['rule']) == (6, 12, 'micro')

def compare_groups(got, want):
    assert {**got, 'Average': got['average']} == pytest.approx({**want, 'average': want['Average']}, abs=1e-6)

@needs_data
def test_truthfulqa_with_known_likelihoods():
    with gzip.open(DATA/'truthfulqa/mc_task_v1.json.gz', 'rt', encoding='utf-8') as source: tasks = json.load(source)
    def certain(task): return {choice: float(50 * label) for key in ('mc1_targets', 'mc2_targets') for choice, label in task[key].items()}
    got = score_rows('truthfulqa', [{**task, 'id': number, 'loglikelihoods': certain(task)} for number, task in enumerate(tasks)])[0]
    assert got['total'] == 817 and got['details']['mc1'] == 100 and got['details']['mc2'] > 99.99
    blind = [{**task, 'id': number, 'loglikelihoods': dict.fromkeys(certain(task), 0.0)} for number, task in enumerate(tasks)]
    shares = [sum(task['mc2_targets'].values()) / len(task['mc2_targets']) for task in tasks]
    assert score_rows('truthfulqa', blind, 'mc2')[0]['score'] == pytest.approx(100 * sum(shares) / len(shares))

@needs_data
def test_gsm8k_own_form():
    path = DATA/'gsm8k/test.jsonl.gz'
    rows = [{**row, 'id': number, 'output': f"…\nA: {row['answer'].split('####')[-1].strip()}"} for number, row in enumerate(read_outputs(path))]
    assert score_rows('gsm8k', rows, 'native')[0]['score'] == 100

PLACES = {'length_controlled_winrate': 0.16, 'lc_peer_code_with_equiv_gamed': 0.17, # The peer's fit has a small penalty
          'lc_plain_mle_with_equiv_gamed': 1e-4, 'glm_weights': 0.02, 'zeroeval': PRINTED, 'mmlu_redux_matrix': PRINTED, 'zebra_matrix': PRINTED,
          'mmlu_redux_outputs': PRINTED, 'zebra_outputs': PRINTED} # Everything else within 1e-6

@needs_data
def test_every_figure_that_was_printed_is_ours():
    from kyara.comparison import published_figures
    rows = published_figures(DATA)
    wrong = [row for row in rows if row[2] != pytest.approx(row[1], abs=next((PLACES[name] for name in row[0] if name in PLACES), 1e-6))]
    assert not wrong and len(rows) > 170, (len(rows), wrong)
    assert {place[0] for place, _, _ in rows} == EXPECTED.keys() - {'opencc', 'drcd_bm25_computed_here'}

@needs_data
def test_a_figure_names_its_rule():
    replies, flags = DATA/'zeroeval/crux/gemma-2-2b-it.jsonl.gz', score_file('zebra-grid', DATA/'zeroeval/zebra-grid/solved_matrix.csv.gz')
    assert [score_file('crux', replies, rule)['rule'] for rule in (None, 'v1', 'v2')] == ['v2', 'v1', 'v2']
    assert flags['total'] == 1000 and flags['score'] is None # Several models in one file
    annotations = DATA/'alpaca_eval/annotations/claude-2.csv.gz'
    for data, figure in ((None, 'win_rate'), (DATA/'alpaca_eval', 'length_controlled_win_rate')):
        got = score_file('alpaca_eval', annotations, data=data)
        assert got['score'] == got['details'][figure] and figure.startswith(got['rule'])

@pytest.mark.parametrize('answer,gold,right', [
    ('$1,200', '1200', True), ('大約 15 天', '15', True), ('-3/4', '-0.75', True), ('7.0', '7', True), ('12', '# 12', True),
    ('1#2', '12', False), # Only the right answer loses its sign
    ('3/0', '3', True), # Nothing can be divided: the first number counts
    ('2**10', '1024', False), # Nothing is evaluated
    ('', '0', False), ('零', '0', False), ('1 2', '12', False), ('0.5', '1/2', True)])
def test_numbers_are_compared_as_zeroeval_does(answer, gold, right): assert same_number(answer, gold) == right

def test_alignbench_judgements_are_read_as_its_script_reads_them():
    "Its patterns take quadratic time; ours may not, and must give the same."
    def theirs(text):
        last = re.search(r'{(.*?)}(?![^{]*{)', text)
        score = dict(re.findall(r"'(.*?)': (\d+)", last[1])).get('综合得分') if last else None
        found = re.search(r"'综合得分': (\d+(\.\d{1,2})?)", text)
        return float(score) if score else float(found[1]) if found else -1.0
    draw = random.Random(0)
    pieces = ['{', '}', "'综合得分': 8", "'综合得分': 7.5", "'清晰度': 6", '\n', "'", ': ', '文', "'综合得分'"]
    texts = [''.join(draw.choices(pieces, k=draw.randint(0, 12))) for _ in range(20_000)]
    assert [alignbench_score(text) for text in texts] == [theirs(text) for text in texts]
    assert len({alignbench_score(text) for text in texts}) > 3

def test_files_of_others_are_read_as_they_are(tmp_path):
    zero = [{'session_id': 'gsm-0', 'chat_history': ['九加六？'], 'model_output': None, 'generator': 'm', 'answer': '15', 'output': ['{"answer": "15"}']},
            {'session_id': 'gsm-1', 'answer': '7', 'output': ['不知道'], 'generator': 'm'}]
    (tmp_path/'zero.json').write_text(json.dumps(zero))
    got = score_file('gsm8k', tmp_path/'zero.json', out=tmp_path/'items.jsonl', partial=True)
    assert (got['score'], got['no_answer'], got['details']['partial'], got['details']['items']) == (50, 50, True, 1319)
    assert [row['id'] for row in read_outputs(tmp_path/'items.jsonl')] == ['gsm-0', 'gsm-1']
    alpaca = [{'instruction': '介紹玉山。', 'output_1': '很高。', 'output_2': '主峰3,952公尺。', 'preference': value, 'index': number, 'annotator': 'x'}
              for number, value in enumerate((1.75, 1.25, None, 0.0))]
    (tmp_path/'annotations.json').write_text(json.dumps(alpaca))
    got = score_file('alpaca_eval', tmp_path/'annotations.json', partial=True)
    assert (got['score'], got['details']['n'], got['no_answer']) == (50, 3, 25)
    (tmp_path/'instruction_difficulty.csv').write_text('index,instruction_difficulty\n' + '\n'.join(f'{n},{n - 1.5}' for n in range(4)))
    with gzip.open(tmp_path/'df_gamed_equiv.csv.gz', 'wt') as file: file.write('std_delta_len,instruction_difficulty,preference\n0.5,0.1,0.5\n-0.5,-0.1,0.5\n')
    assert 0 < score_file('alpaca_eval', tmp_path/'annotations.json', data=tmp_path, partial=True)['details']['length_controlled_win_rate'] < 100

def outputs(count, first=0): return [{'id': str(number), 'answer': '1', 'output': '{"answer": "1"}'} for number in range(first, first + count)]

def test_a_wrong_number_of_rows_is_refused_unless_told():
    for count in (1, 10, 400, 799, 801):
        with pytest.raises(UserError, match=f'800 items and the file has {count};.*--partial'): score_rows('crux', outputs(count))
        got = score_rows('crux', outputs(count), partial=True)[0]
        assert got['details']['partial'] and got['details']['items'] == 800 and got['total'] == count
    whole = score_rows('crux', outputs(800))[0]
    assert 'partial' not in whole['details']

JUDGED = {'mt-bench': [{'question_id': number, 'turn': turn, 'model': 'm', 'judgment': '[[8]]'} for number in range(81, 161) for turn in (1, 2)],
          'arena-hard': [{'question_id': number, 'model': 'm', 'games': [{'judgment': '[[A>B]]'}] * 2} for number in range(500)],
          'alignbench': [{'id': number, 'category': name, 'judgment': "{'综合得分': 8}"} for number, name in zip(range(683), 86 * [
              '数学计算', '逻辑推理', '基本任务', '中文理解', '综合问答', '文本写作', '角色扮演', '专业能力'])],
          'tmmluplus': [{'id': number, 'subject': 'physics', 'answer': 'A', 'output': 'A'} for number in range(20160)],
          'truthfulqa': [{'id': number, 'labels': [1, 0], 'loglikelihoods': [-1, -2]} for number in range(817)],
          'alpaca_eval': [{'index': number, 'preference': 1.5} for number in range(805)]}

@pytest.mark.parametrize('benchmark', JUDGED)
def test_judgements_are_counted_as_well(benchmark):
    rows = JUDGED[benchmark]
    assert 'partial' not in score_rows(benchmark, rows)[0]['details']
    with pytest.raises(UserError, match='the file has .*--partial'): score_rows(benchmark, rows[:-1])
    with pytest.raises(UserError, match='twice|2 times'): score_rows(benchmark, [*rows, rows[0]])
    assert score_rows(benchmark, rows[8:], partial=True)[0]['details']['partial']

def test_two_models_in_one_file_are_counted_apart():
    rows = JUDGED['mt-bench']
    with pytest.raises(UserError, match='has 159 of n;'): score_rows('mt-bench', rows + [{**row, 'model': 'n'} for row in rows[1:]])
    assert score_rows('mt-bench', rows + rows)[0]['details']['m']['n'] == 320 # The judge went over everything twice

def test_a_sample_may_say_so_in_its_name(tmp_path):
    for name, refused in (('crux.partial10.jsonl', False), ('crux.first10.jsonl', False), ('crux_10q.jsonl', False), ('crux_sample_of_10.jsonl', False),
                          ('crux.partial11.jsonl', True), ('crux.partial.jsonl', True), ('crux_10.jsonl', True), ('model-10b.jsonl', True)):
        (tmp_path/name).write_text('\n'.join(map(json.dumps, outputs(10))))
        if not refused: assert score_file('crux', tmp_path/name)['details']['partial']; continue
        with pytest.raises(UserError, match='--partial'): score_file('crux', tmp_path/name)

def test_missing_and_foreign_items_are_named(tmp_path):
    path = tmp_path/'items.jsonl'
    path.write_text('\n'.join(json.dumps({'id': row['id']}) for row in outputs(5)))
    got = score_rows('crux', outputs(5), items=path)[0]
    assert got['score'] == 100 and got['details']['partial'] # Every item that was asked, and yet not the whole benchmark
    with pytest.raises(UserError, match='2 items have no output.*first is 3'): score_rows('crux', outputs(3), items=path)
    with pytest.raises(UserError, match='1 outputs are of no item.*first is 5'): score_rows('crux', outputs(6), items=path)

def test_gold_answers_may_come_with_the_items(tmp_path):
    "ZeroEval's own files leave the solutions of puzzles out, and GSM8K's gold answers are whole solutions."
    table = {'header': ['House', '姓名'], 'rows': [['1', '阿明'], ['2', '小美']]}
    reply = json.dumps({'solution': {'House 1': {'姓名': '阿明'}, 'House 2': {'姓名': '小美'}}})
    rows = [{'session_id': f'lgp-test-2x2-{number}', 'output': [reply], 'generator': 'm'} for number in range(2)]
    with pytest.raises(UserError, match='solution'): score_rows('zebra-grid', rows, partial=True)
    (tmp_path/'zebra.jsonl').write_text('\n'.join(json.dumps({'id': row['session_id'], 'solution': table}) for row in rows))
    assert score_rows('zebra-grid', rows, items=tmp_path/'zebra.jsonl')[0]['score'] == 100
    (tmp_path/'gsm.jsonl').write_text(json.dumps({'question': '3加4？', 'answer': '3 + 4 = <<3+4=7>>7\n#### 7'}))
    assert score_rows('gsm8k', [{'output': '{"answer": "7"}'}], items=tmp_path/'gsm.jsonl')[0]['score'] == 100
    (tmp_path/'crux.jsonl').write_text(json.dumps({'id': 'sample_0', 'code': 'x', 'output': '7'})) # Its gold answers are called output
    with pytest.raises(UserError, match='no output'): score_rows('crux', [{'id': 'sample_0', 'answer': '7'}], items=tmp_path/'crux.jsonl')

def test_empty_outputs_are_no_answers_and_judges_without_verdict_are_counted():
    empty = [{**row, 'output': value} for row, value in zip(outputs(4), ('', [], None, '{"answer": "1"}'))]
    got = score_rows('gsm8k', empty, partial=True)[0]
    assert (got['score'], got['no_answer'], got['total']) == (25, 75, 4)
    judged = [{'question_id': number, 'turn': 1, 'model': 'm', 'judgment': text} for number, text in enumerate(('[[8]]', '我不評分'))]
    got = score_rows('mt-bench', judged, partial=True)[0]
    assert (got['score'], got['no_answer'], got['details']['m']['errors']) == (8, 50, 1)
    games = [{'question_id': 1, 'model': 'm', 'games': [{'judgment': '[[B>A]]'}, {'judgment': '都好'}]}]
    assert score_rows('arena-hard', games, partial=True)[0]['no_answer'] == 50

def test_every_mistake_is_one_line(tmp_path):
    (tmp_path/'cut.json').write_text('[{"id": 1, "answer": "2"')
    cases = [lambda: score_file('gsm8k', tmp_path/'cut.json'), lambda: score_file('gsm8k', tmp_path), lambda: score_rows('gsm9k', outputs(1)),
             lambda: score_rows('crux', outputs(1), 'v9'), lambda: score_rows('crux', outputs(2) * 2), lambda: score_rows('crux', outputs(799)),
             lambda: score_rows('mmlu-redux', [{'id': 1, 'output': 3}]), lambda: score_rows('zebra-grid', [{'id': 'x', 'output': 'x'}]),
             lambda: score_rows('arena-hard', [{'model': 'm'}]), lambda: score_rows('alignbench', [{'id': 1, 'category': '数学计算', 'judgment': 'x'}]),
             lambda: score_rows('tmmluplus', [{'id': 1, 'output': 'A', 'answer': 'A'}]), lambda: score_rows('truthfulqa', [{'id': 1}]),
             lambda: score_rows('mt-bench', [{'judgment': '[[8]]'}]), lambda: score_rows('chinese-reason-bench', [{'id': 1, 'judgment': '9分'}])]
    for case in cases:
        with pytest.raises(UserError) as error: case()
        assert str(error.value).strip() and '\n' not in str(error.value) and len(str(error.value)) < 300, str(error.value)

@pytest.mark.parametrize('name,content,word', [
    ('cut.jsonl.gz', gzip.compress(b'{"id": 1}\n' * 1000)[:40], 'truncated'), ('plain.json.gz', b'[]', 'not gzip'),
    ('cut.jsonl', b'{"id": 1, "answer": "2", "output": "2"}\n{"id": 2, "ans', 'line 2'), ('cut.json', b'[{"id": 1}', 'line 1'),
    ('braces.jsonl', b'{' * 10**6, 'line 1'), ('brackets.json', b'[' * 10**6, 'line 1'), ('binary.json', bytes(range(256)), 'not UTF-8'),
    ('zeros.jsonl', bytes(1000), 'line 1'), ('numbers.json', b'[NaN, 1]', 'row 1 is not an object'), ('empty.jsonl', b'', 'no rows'),
    ('empty.json', b'[]', 'no rows'), ('empty.csv', b'id,answer,output\n', 'no rows'), ('cut.csv', b'id,answer,output\n1,2', 'row 1 has other columns'),
    ('quote.csv', b'id,answer,output\n1,2,"{', 'whole')])
def test_bad_files_are_named(name, content, word, tmp_path):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(UserError, match=word) as error: score_file('gsm8k', tmp_path/name)
    assert name in str(error.value) and '\n' not in str(error.value) and len(str(error.value)) < 300

def test_what_a_file_is_called_decides_little(tmp_path):
    text = '\n'.join(map(json.dumps, [{'id': '1', 'answer': '7', 'output': 'x' * 200_000}, *outputs(2)[:1]]))
    (tmp_path/'lines.json').write_text(text)
    (tmp_path/'list.jsonl').write_text(f"[{text.replace(chr(10), ',')}]")
    with open(tmp_path/'table.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, ['id', 'answer', 'output'])
        writer.writeheader()
        writer.writerows(map(json.loads, text.split('\n')))
    got = [read_outputs(tmp_path/name) for name in ('lines.json', 'list.jsonl', 'table.csv')]
    assert got[0] == got[1] == got[2] and len(got[0][0]['output']) == 200_000
    for path in (tmp_path, tmp_path/'none.json'):
        with pytest.raises(UserError, match='cannot be read'): score_file('gsm8k', path)

@pytest.mark.parametrize('benchmark,rows,rule,word', [
    ('gsm8k', [{'id': 1, 'answer': '2', 'output': '2'}] * 2, None, 'twice'),
    ('gsm8k', [{'id': 1, 'output': '2'}], None, 'no gold answer'),
    ('gsm8k', [{'id': 1, 'answer': '2'}], None, 'no output'),
    ('gsm8', [{}], None, 'did you mean gsm8k'),
    ('crux', [{}], 'v3', 'it has v2, v1'),
    ('alpaca_eval', [{'preference': 1.2}], 'length_controlled', '--data'),
    ('tmmluplus', [{'subject': 'physics', 'acc': '0.5'}], None, 'needs 66 subjects; 65 are missing, the first is accounting'),
    ('tmmluplus', [{'subject': 'physics', 'acc': '0.5', 'n': float('inf')}], None, 'another form'),
    ('truthfulqa', [{'labels': [1], 'loglikelihoods': []}], None, 'needs labels'),
    ('truthfulqa', [{'labels': [1, 0], 'loglikelihoods': [-1.0, float('nan')]}], 'mc2', 'NaN'),
    ('alpaca_eval', [{'preference': 7}], None, 'preference 7; it lies between 1 and 2'),
    ('zebra-grid', [{'id': 'lgp-test-2x2-0', 'kyara': 'true'}], None, "kyara has 'true' for item lgp-test-2x2-0"),
    ('chinese-reason-bench', [{'id': 1, 'judge_score': 11}], None, 'no judgement could be read'),
])
def test_mistakes_are_named(benchmark, rows, rule, word):
    with pytest.raises(UserError, match=word): score_rows(benchmark, rows, rule, partial=benchmark != 'gsm8k')

def test_output_is_never_evaluated(tmp_path):
    trap = tmp_path/'trap'
    output = json.dumps({'answer': f'__import__("pathlib").Path("{trap}").touch()/2'})
    for benchmark in ('gsm8k', 'math-l5', 'crux'):
        score_rows(benchmark, [{'id': 1, 'answer': '2', 'output': output}], partial=True)
    assert not trap.exists()
