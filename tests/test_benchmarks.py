"""Each benchmark from its items to its figure: stored replies of others, played back to the runner, give what was published.

The public files are not part of the project: those tests run only where they lie.
"""
import csv
import gzip
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kyara.benchmarks import CRUX, GSM8K, MATH_L5, MMLU_REDUX, TMMLUPLUS, TMMLUPLUS_LIKELIHOOD, TRUTHFULQA, TRUTHFULQA_MC2, ZEBRA, converted, tmmluplus_average
from kyara.core import UserError
from kyara.evaluate import (answer_loglikelihoods, comparison_html, comparison_latex, comparison_table, evaluate_models, figures, find_benchmark,
                            judge_models, length_controlled, paired_difference, read_items, run_choices, run_generation, run_judging)
from kyara.judged import ALIGNBENCH, ALIGNBENCH_TW, ALPACA_EVAL, ARENA_HARD, BENCHMARKS, MT_BENCH, MT_BENCH_TW, REASON, pair_games
from kyara.llm import Reply
from kyara.score import output_text, read_outputs, score_file, score_rows

DATA = Path(__file__).parent.parent.parent/'shared'/'data'
EXPECTED = json.loads((DATA/'expected.json').read_text()) if (DATA/'expected.json').exists() else None
needs_data = pytest.mark.skipif(EXPECTED is None, reason=f'no public benchmark cases at {DATA}')
PRINTED = 0.0051 # Published figures have two digits

class Scripted:
    "A model that says what it is told to say, one reply after the other; it keeps what it was asked."
    def __init__(self, replies, model='scripted'): self.replies, self.model, self.asked = iter(replies), model, []
    def ask(self, prompts, label='', **sampling):
        self.asked += prompts
        return [Reply('key', *((reply, 'stop') if isinstance(reply := next(self.replies), str) else reply)) for _ in prompts]

def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(json.dumps(row, ensure_ascii=False) for row in rows), encoding='utf-8')
    return path

def named(rows, model='kyara'): return [{**row, 'model': model} for row in rows]

# Stored replies, played back

def play_back(benchmark, path, model, **lacking):
    "Run a benchmark with the stored replies of a model; `lacking` are fields that the public file leaves out."
    rows = read_outputs(path)
    benchmark = replace(benchmark, read=lambda place: [{**lacking, **row, 'id': str(row['id'])} for row in read_outputs(place)])
    items, dropped = read_items(benchmark, path, partial=True)
    assert not dropped and len(items) == len(rows)
    transcripts, dropped = run_generation(benchmark, items, Scripted(map(output_text, rows), model))
    assert not dropped and [row['reply'] for row in transcripts] == [output_text(row) for row in rows]
    return transcripts, figures(named(transcripts))['kyara'][benchmark.name]

ZEROEVAL = [(GSM8K, 'gsm', {'question': ''}), (MATH_L5, 'math-l5', {'problem': '1+1?'}), (CRUX, 'crux', {'question': 'f(1) == ?'}),
            (BENCHMARKS['crux-v1'], 'crux', {'question': 'f(1) == ?'})]

@needs_data
@pytest.mark.parametrize('model', ['gemma-2-2b-it', 'Meta-Llama-3.1-8B-Instruct'])
@pytest.mark.parametrize('benchmark,folder,lacking', ZEROEVAL, ids=lambda value: getattr(value, 'name', None))
def test_stored_replies_give_the_published_figure(benchmark, folder, lacking, model):
    path = DATA/f'zeroeval/{folder}/{model}.jsonl.gz'
    transcripts, got = play_back(benchmark, path, model, **lacking)
    want, rule = EXPECTED['zeroeval'][folder][model], {'crux': '_rule_v2', 'crux-v1': '_rule_v1'}.get(benchmark.name, '')
    assert got['score'] == pytest.approx(want[f'published_acc{rule}'], abs=PRINTED) and 'partial' not in got
    assert got['no_answer'] == pytest.approx(want['published_no_answer'], abs=PRINTED)
    _, flags = score_rows(benchmark.name.removesuffix('-v1'), read_outputs(path), {'crux-v1': 'v1'}.get(benchmark.name), model=model)
    assert [row['score'] for row in transcripts] == [float(item['correct']) for item in flags]

@needs_data
@pytest.mark.parametrize('name', ['Llama-3.1-405B-Inst@hyperbolic.partial51', 'Qwen2-72B-Instruct.first376'])
def test_mmlu_redux_played_back(name):
    path = DATA/f'zeroeval/mmlu-redux/{name}.jsonl.gz'
    transcripts, got = play_back(MMLU_REDUX, path, name, question='')
    want = EXPECTED['mmlu_redux_outputs'][name]
    assert got['score'] == pytest.approx(want.get('published_acc', want.get('acc')), abs=PRINTED) and got['partial']
    flags = [row['published_correct'] for row in read_outputs(path) if 'published_correct' in row]
    assert not flags or [int(row['score']) for row in transcripts] == flags

@needs_data
def test_zebra_played_back():
    (name, want), = EXPECTED['zebra_outputs'].items()
    transcripts, got = play_back(ZEBRA, DATA/f'zeroeval/zebra-grid/{name}.jsonl.gz', name)
    figures_of = (got['score'], got['parts']['easy'], got['parts']['hard'], got['no_answer'])
    assert figures_of == pytest.approx((want['puzzle_acc'], want['easy'], want['hard'], want['no_answer']), abs=PRINTED)
    prompt = transcripts[0]['messages'][0]['content']
    assert '"House 5"' in prompt and '"House 6"' not in prompt and transcripts[0]['item_id'].startswith('hard/lgp-test-5x6')

@needs_data
@pytest.mark.parametrize('name,place,count', [
    ('gsm8k', 'gsm8k/test.jsonl.gz', 1319), ('crux', 'cruxeval/cruxeval.jsonl.gz', 800), ('truthfulqa', 'truthfulqa/mc_task_v1.json.gz', 817),
    ('truthfulqa-mc2', 'truthfulqa/mc_task_v1.json.gz', 817), ('mt-bench', 'mt_bench', 80), ('mt-bench-tw', 'mt_bench_tw', 80),
    ('alignbench', 'alignbench', 683), ('alignbench-tw', 'alignbench', 683)])
def test_public_files_are_read_whole(name, place, count):
    items, dropped = read_items(find_benchmark(name), DATA/place)
    assert len(items) == count and not dropped and all(item['messages'][0]['content'].strip() for item in items)

@needs_data
def test_tmmluplus_sample_played_back():
    path = DATA/'tmmluplus/sample_questions_12.jsonl'
    rows = read_outputs(path)
    items, _ = read_items(TMMLUPLUS, path)
    transcripts, _ = run_generation(TMMLUPLUS, items, Scripted(['我想一想。'] * 12 + [row['raw_output'] for row in rows]))
    got = figures(named(transcripts))['kyara']['tmmluplus']
    assert got['score'] == 50 and 'micro' in got['rule'], got # The sample has a few of the 66 subjects

@needs_data
def test_tmmluplus_averages_have_their_names():
    with open(DATA/'tmmluplus/lm_eval_Llama-3.1-TAIDE-LX-8B-Chat.csv', encoding='utf-8') as lines: rows = list(csv.DictReader(lines))
    means, counts = ({row['subject']: kind(row[name]) for row in rows} for name, kind in (('acc', float), ('n', int)))
    want, = EXPECTED['tmmluplus_lm_eval'].values()
    for rule, figure in (('weighted67', want['rule_lm_eval_size_weighted']['tmmluplus']), ('mean66', want['computed_here_rule_mean_of_66_subjects']),
                         ('macro4', want['computed_here_rule_ikala_macro4_66_subjects']['Average'])):
        assert tmmluplus_average(rule)(means, counts)[rule] == pytest.approx(figure, abs=1e-6)

# What the judge sees, and what becomes of its verdicts

@needs_data
def test_mt_bench_prompts_and_scores_are_those_of_its_authors():
    rows = [row for row in read_outputs(DATA/'mt_bench/judgments/alvarobartt__FastChat.gpt-4_single.jsonl.gz')
            if row['model'] == 'mistral-orpo-capybara']
    answers = {str(row['question_id']): row['choices'][0]['turns'] for row in read_outputs(DATA/'mt_bench/model_answer/mistral-orpo-capybara.jsonl.gz')}
    items, _ = read_items(MT_BENCH, DATA/'mt_bench')
    turns = [answers[item['id']][turn] for turn in (0, 1) for item in items]
    transcripts, _ = run_generation(MT_BENCH, items, Scripted(turns))
    stored = {(str(row['question_id']), row['turn']): row for row in rows}
    judge = Scripted([stored[item['id'], turn]['judgment'] for item in items for turn in (1, 2)])
    judgements, dropped = run_judging(MT_BENCH, items, transcripts, judge)
    assert [messages[1]['content'] for messages in judge.asked] == [stored[item['id'], turn]['user_prompt'] for item in items for turn in (1, 2)]
    got = figures(named(transcripts), judgements=named(judgements))['kyara']['mt-bench']
    want = EXPECTED['mt_bench_single']['alvarobartt/FastChat']['mistral-orpo-capybara']
    assert (got['score'], got['parts']['turn1'], got['parts']['turn2']) == pytest.approx((want['average'], want['turn1'], want['turn2']), abs=1e-4)
    assert len(judgements) == 160 and not dropped and got['low'] < got['score'] < got['high'] and 'partial' not in got

@needs_data
def test_mt_bench_tw_uses_a_reference_wherever_there_is_one():
    rows = MT_BENCH_TW.read(DATA/'mt_bench_tw')
    known = {str(row['question_id']) for row in read_outputs(next((DATA/'mt_bench_tw').glob('reference*')))}
    assert {row['id'] for row in rows if row['references']} == known and len(known) > 30
    first = next(row for row in rows if row['references'])
    assert all(first['references'][0] in dict(MT_BENCH_TW.judge.games(first, ['答一', '答二']))[turn][1]['content'] for turn in ('turn1', 'turn2'))

@needs_data
def test_arena_hard_games_are_those_of_its_authors(tmp_path):
    path = DATA/'arena_hard/judgments_gemini15pro_phi3medium_7q.jsonl'
    stored = read_outputs(path)
    form = r"<\|User Prompt\|>\n(.*)\n\n<\|The Start of Assistant A's Answer\|>\n(.*)\n<\|The End of .*Assistant B's Answer\|>\n(.*)\n<\|The End of .*"
    parts = [re.fullmatch(form, row['games'][0]['user_prompt'], re.DOTALL).groups() for row in stored]
    write(tmp_path/'question.jsonl', [{'uid': row['question_id'], 'prompt': part[0]} for row, part in zip(stored, parts)])
    write(tmp_path/'gpt-4-0314.jsonl', [{'question_id': row['question_id'], 'choices': [{'turns': [{'content': part[1]}]}]} for row, part in zip(stored, parts)])
    items, _ = read_items(ARENA_HARD, tmp_path, partial=True)
    transcripts, _ = run_generation(ARENA_HARD, items, Scripted([part[2] for part in parts]))
    games = [game for row in stored for game in row['games']]
    judge = Scripted([game['judgment'] for game in games])
    judgements, _ = run_judging(ARENA_HARD, items, transcripts, judge)
    assert [messages[1]['content'] for messages in judge.asked] == [game['user_prompt'] for game in games]
    got = figures(named(transcripts), judgements=named(judgements))['kyara']['arena-hard']
    assert got['score'] == pytest.approx(score_file('arena-hard', path)['score'], abs=1e-4) and got['n'] == 7

@needs_data
@pytest.mark.parametrize('model', EXPECTED['alpaca_eval'] if EXPECTED else [])
def test_alpaca_eval_at_equal_length(model):
    "Only lengths and preferences are public: texts of that length stand for them."
    with gzip.open(DATA/f'alpaca_eval/annotations/{model}.csv.gz', 'rt', encoding='utf-8') as lines: rows = list(csv.DictReader(lines))
    transcripts = [{'benchmark': 'alpaca_eval', 'item_id': row['index'], 'model': 'kyara', 'gold': 'x' * int(row['len_output_1']),
                    'reply': 'x' * int(row['len_output_2']), 'finish_reason': 'stop', 'score': None} for row in rows]
    score = lambda value: 0.5 if float(value) == 0 else float(value) - 1
    judgements = [{**answer, 'item_id': f"m/{row['index']}", 'extracted': 'm', 'score': score(row['preference']) if row['preference'] else None}
                  for answer, row in zip(transcripts, rows)]
    want, got = EXPECTED['alpaca_eval'][model], length_controlled(transcripts, judgements, DATA/'alpaca_eval', rounds=20)
    assert got['score'] == pytest.approx(want['length_controlled_winrate'], abs=0.16) and got['low'] < got['score'] < got['high']
    assert figures(transcripts, judgements=judgements)['kyara']['alpaca_eval']['score'] == pytest.approx(want['win_rate'], abs=1e-4)

def test_alpaca_eval_order_depends_on_the_item_alone():
    rows = [{'id': str(number), 'instruction': f'第{number}題', 'output': '甲'} for number in range(40)]
    shown = [ALPACA_EVAL.judge.games(row, ['乙'])[0][0] for row in rows]
    assert 8 < shown.count('m') < 32 and shown == [ALPACA_EVAL.judge.games(row, ['丙'])[0][0] for row in rows]
    first = ALPACA_EVAL.judge.games(rows[shown.index('m')], ['乙'])[0][1][0]['content']
    assert first.index('乙') < first.index('甲')

COLUMNS = {'数学计算': 'math', '逻辑推理': 'logic', '基本任务': 'fundamental', '中文理解': 'chinese', '综合问答': 'open_qa', '文本写作': 'writing',
           '角色扮演': 'roleplay', '专业能力': 'professional'}

@needs_data
def test_alignbench_is_averaged_as_its_leaderboard():
    with open(DATA/'alignbench/leaderboard_v1.1.csv', encoding='utf-8') as lines: rows = list(csv.DictReader(lines))
    assert len(rows) == EXPECTED['alignbench_rows']
    for row in rows:
        got = ALIGNBENCH.aggregate({name: float(row[column]) for name, column in COLUMNS.items()}, {})
        assert (got['overall'], got['reasoning'], got['language']) == pytest.approx([float(row[name]) for name in ('overall', 'reasoning', 'language')], abs=0.0102)

def align_folder(folder):
    names = ['数学计算', '逻辑推理', '基本任务', '中文理解', '综合问答', '文本写作', '角色扮演', '专业能力']
    write(folder/'data.jsonl', [{'question_id': number, 'category': name, 'subcategory': '其他', 'question': f'这是什么题目{number}？',
                                 'reference': '标准答案', 'evidences': [{'url': 'x', 'quote': '证据'}]} for number, name in enumerate(names)])
    for name, value in (('subcategory_question_mapping', {'其他': '事实与解释型回答'}), ('dimension_set', {'事实与解释型回答': ['清晰度']}),
                        ('dimension_definition', {'清晰度': '是否清楚'})):
        write(folder/f'config/{name}.json', [value])
    return folder

def test_alignbench_in_both_scripts_and_an_unreadable_judgement(tmp_path):
    folder = align_folder(tmp_path)
    for benchmark, words in ((ALIGNBENCH, ('这是什么题目', '标准答案', '证据')), (ALIGNBENCH_TW, ('這是什麼題目', '標準答案', '證據'))):
        items, _ = read_items(benchmark, folder, partial=True)
        transcripts, _ = run_generation(benchmark, items, Scripted(['回答'] * 8))
        judge = Scripted(["{'清晰度': 7, '综合得分': 7}"] * 7 + ['我不評分'])
        judgements, _ = run_judging(benchmark, items, transcripts, judge)
        assert all(word in judge.asked[0][0]['content'] for word in (*words, '是否清楚'))
        got = figures(named(transcripts), judgements=named(judgements))['kyara'][benchmark.name]
        # 专业能力 is -1 and stays in the mean of the six.
        assert (got['no_answer'], got['parts']['language']) == (12.5, pytest.approx((5 * 7 - 1) / 6, abs=1e-3)), got
        assert got['score'] == pytest.approx((7 + (5 * 7 - 1) / 6) / 2, abs=1e-3)

def reason_items(tmp_path, count=3):
    rows = [{'id': str(number), 'question': f'第{number}題：誰最矮？', 'reference': '丙'} for number in range(count)]
    return read_items(REASON, write(tmp_path/'reason.jsonl', rows))[0]

def test_a_judge_without_a_verdict_is_counted_and_a_failed_call_dropped(tmp_path):
    items = reason_items(tmp_path, 4)
    transcripts, _ = run_generation(REASON, items, Scripted(['丙'] * 4))
    judge = Scripted(['{"judge_score": 9}', '寫得很好', '{"judge_score": 99}', ('', 'error')])
    judgements, dropped = run_judging(REASON, items, transcripts, judge)
    assert [row['score'] for row in judgements] == [9.0, None, None] and [row['drop_reason'] for row in dropped] == ['judge_error']
    got = figures(named(transcripts), judgements=named(judgements))['kyara']['chinese-reason-bench']
    assert got['score'] == 9 and got['no_answer'] == pytest.approx(66.6667) and got['n'] == 4
    with pytest.raises(UserError, match='did it answer'): figures(named(transcripts), judgements=named(judgements[1:]))

def test_order_bias_cancels_out():
    games = pair_games('題目', '甲', '乙')
    assert [name for name, _ in games] == ['game1', 'game2'] and games[0][1][1]['content'].index('甲') < games[0][1][1]['content'].index('乙')
    score = ARENA_HARD.judge.score
    assert [score(verdict, 'game1') + score(verdict, 'game2') for verdict in ('A>B', 'B>>A', 'A=B')] == [1.0, 1.0, 1.0]
    assert ARENA_HARD.judge.verdict('[[A>>>B]]') is None and ARENA_HARD.judge.verdict('[[A>B]] or [[B>A]]') is None

# Turns

def test_an_empty_or_failed_first_turn_ends_the_conversation(tmp_path):
    row = {'subject': 'physics', 'question': '？', 'A': '1', 'B': '2', 'C': '3', 'D': '4', 'answer': 'B'}
    items, _ = read_items(TMMLUPLUS, write(tmp_path/'items.jsonl', [{**row, 'id': str(number)} for number in range(4)]))
    client = Scripted([('', 'empty'), ('選B', 'length'), ('', 'error'), '選 B', '{"answer": "B"}', '(B)'])
    transcripts, dropped = run_generation(TMMLUPLUS, items, client)
    assert [(row['item_id'], row['score'], row['finish_reason']) for row in transcripts] == [
        ('physics/0', 0.0, 'empty'), ('physics/1', 1.0, 'length'), ('physics/3', 1.0, 'stop')]
    assert [row['drop_reason'] for row in dropped] == ['reply_error'] and len(client.asked) == 6
    assert figures(named(transcripts))['kyara']['tmmluplus']['truncated'] == pytest.approx(33.3333)

# Log-likelihoods

@pytest.fixture(scope='module')
def student(tmp_path_factory):
    from kyara.sft import make_student
    texts = ['吞下西瓜子會怎樣？什麼事也不會發生，西瓜子會排出體外。', '臺灣最高的山是玉山，主峰海拔3,952公尺。', 'A) 雪山 B) 玉山 C) 合歡山 D) 大霸尖山'] * 20
    small = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    return str(make_student(texts, tmp_path_factory.mktemp('model')/'student', **small))

TRUTHFUL = [{'question': f'{number}吞下西瓜子會怎樣？', 'mc1_targets': {'會長出西瓜': 0, '什麼事也不會發生': 1, '會肚子痛': 0},
             'mc2_targets': {'會長出西瓜': 0, '什麼事也不會發生': 1, '會排出體外': 1, '不': 0}} for number in ('', '如果有人', '在臺灣')]

def test_shared_prefixes_change_no_choice(student, tmp_path):
    path = write(tmp_path/'truthful.jsonl', TRUTHFUL)
    for benchmark in (TRUTHFULQA, TRUTHFULQA_MC2):
        items, _ = read_items(benchmark, path, partial=True)
        pairs = [(item['messages'], choice) for item in items for choice in benchmark.choices(item['row'])]
        alone = [answer_loglikelihoods(student, [pair])[0][0] for pair in pairs]
        for batch_size in (1, 5, 64):
            together = [value for value, _, _ in answer_loglikelihoods(student, pairs, batch_size)]
            assert together == pytest.approx(alone, abs=1e-3)
    transcripts = run_choices(TRUTHFULQA_MC2, items, student)
    stored = [{'id': row['item_id'], 'labels': list(item['row']['mc2_targets'].values()), 'loglikelihoods': json.loads(row['reply'])}
              for row, item in zip(transcripts, items)]
    want = score_rows('truthfulqa', stored, 'mc2', partial=True)[0]['score']
    assert figures(named(transcripts))['kyara']['truthfulqa-mc2']['score'] == pytest.approx(want, abs=0.02)

def test_a_model_that_is_not_whole_has_no_figure(student, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file
    shutil.copytree(student, tmp_path/'model')
    weights = load_file(tmp_path/'model/model.safetensors')
    save_file({name: torch.full_like(value, float('nan')) for name, value in weights.items()}, tmp_path/'model/model.safetensors', {'format': 'pt'})
    items, _ = read_items(TRUTHFULQA, write(tmp_path/'truthful.jsonl', TRUTHFUL), partial=True)
    with pytest.raises(UserError, match='NaN likely; are its weights whole'): run_choices(TRUTHFULQA, items, str(tmp_path/'model'))

def test_truthfulqa_as_the_hub_writes_it(tmp_path):
    lists = [{**row, **{name: {'choices': list(row[name]), 'labels': list(row[name].values())} for name in ('mc1_targets', 'mc2_targets')}} for row in TRUTHFUL]
    plain, hub = (read_items(TRUTHFULQA, write(tmp_path/f'{name}.jsonl', rows), partial=True)[0] for name, rows in (('a', TRUTHFUL), ('b', lists)))
    assert [(item['messages'], item['gold'], item['row']['mc2_targets']) for item in plain] == [(item['messages'], item['gold'], item['row']['mc2_targets']) for item in hub]

# Sets of the hub, in the columns and types that they have there

def hub_set(folder, parts, form='parquet'):
    "Make a folder as a data set of the hub is laid out: a card with its configurations, and a file for each split."
    import datasets
    lines = ['---', 'license: mit', 'configs:']
    for (config, split), rows in parts.items():
        place = f'{config}/{split}-00000-of-00001.{form}'
        (folder/config).mkdir(parents=True, exist_ok=True)
        data = datasets.Dataset.from_list(rows)
        data.to_parquet(folder/place) if form == 'parquet' else data.to_csv(folder/place, index=False)
        lines += [f'- config_name: {config}', '  data_files:', f'  - split: {split}', f'    path: {place}']
    (folder/'README.md').write_text('\n'.join([*lines, '---', '']), encoding='utf-8')
    return f'hf:{folder}'

SOLUTION = {'header': ['House', '姓名', '飲料'], 'rows': [['1', '阿明', '咖啡'], ['2', '小美', '茶']]}
TARGETS = {'choices': ['會長出西瓜', '什麼事也不會發生'], 'labels': [0, 1]}
HUB = [('gsm8k', 'main', 'test', {'question': '3加4是多少？', 'answer': '3 + 4 = <<3+4=7>>7\n#### 7'}, '7'),
       ('math-l5', 'default', 'train', {'id': 0, 'problem': '3加4是多少？', 'answer': '7', 'url': 'https://example.org'}, '7'),
       ('crux', 'default', 'test', {'code': 'def f(text):\n    return text', 'input': "'茶'", 'output': "'茶'", 'id': 'sample_0'}, "'茶'"),
       ('mmlu-redux', 'mmlu-redux', 'test', {'id': 'anatomy-#0', 'question': '？', 'choices': ['甲', '乙', '丙', '丁'], 'correct_answer': '丙'}, 'C'),
       ('mmlu-redux', 'anatomy', 'test', {'question': '？', 'choices': ['甲', '乙', '丙', '丁'], 'answer': 2, 'error_type': 'ok', 'correct_answer': None}, 'C'),
       ('zebra-grid', 'grid_mode', 'test', {'id': 'lgp-test-2x2-0', 'size': '2*2', 'puzzle': '？', 'solution': SOLUTION, 'created_at': '2024'}, '4 cells'),
       ('truthfulqa', 'multiple_choice', 'validation', {'question': '？', 'mc1_targets': TARGETS, 'mc2_targets': TARGETS}, '什麼事也不會發生'),
       ('tmmluplus', 'physics', 'test', {'question': '？', 'A': '甲', 'B': '乙', 'C': '丙', 'D': '丁', 'answer': 'B'}, 'B'),
       ('tmmluplus', 'tmmluplus-physics', 'test', {'id': 'x', 'question': '？', 'A': '甲', 'B': '乙', 'C': '丙', 'D': '丁', 'answer': 'B', 'subject': 'physics'}, 'B'),
       ('chinese-reason-bench', 'default', 'test', {'question': '誰最矮？', 'answer': '丙'}, '丙')]

@pytest.mark.parametrize('name,config,split,row,gold', HUB, ids=lambda value: value if isinstance(value, str) else '')
def test_sets_of_the_hub_are_read(name, config, split, row, gold, tmp_path):
    place = hub_set(tmp_path, {(config, split): [row] * 3 if 'id' not in row else [row]})
    items, dropped = read_items(find_benchmark(name), f'{place}?config={config}&split={split}', partial=True)
    assert [item['gold'] for item in items] == [gold] * (1 if 'id' in row else 3) and not dropped
    assert items[0]['messages'][0]['content'].strip() and (name != 'tmmluplus' or items[0]['id'].startswith('physics/'))

def test_the_subjects_of_tmmluplus_are_configurations(tmp_path):
    row = {'question': '？', 'A': '甲', 'B': '乙', 'C': '丙', 'D': '丁', 'answer': 'B'}
    place = hub_set(tmp_path, {(name, 'test'): [row] * 2 for name in ('physics', 'ttqav2', 'linear_algebra', 'readme')}, 'csv')
    items, _ = read_items(TMMLUPLUS, f'{place}?split=test')
    assert [item['id'] for item in items] == [f'{name}/{number}' for name in ('linear_algebra', 'physics', 'ttqav2') for number in (0, 1)]

def test_a_set_without_its_solutions_or_its_files_is_no_benchmark(tmp_path):
    blank = {**SOLUTION, 'rows': [[house, '___', '___'] for house, *_ in SOLUTION['rows']]}
    place = hub_set(tmp_path/'blank', {('grid_mode', 'test'): [{'id': 'lgp-test-2x2-0', 'puzzle': '？', 'solution': blank}]})
    items, dropped = read_items(ZEBRA, f'{place}?config=grid_mode&split=test', partial=True)
    assert not items and [row['drop_reason'] for row in dropped] == ['no_gold']
    place = hub_set(tmp_path/'cut', {(name, 'test'): [{'question': '？', 'answer': '#### 7'}] for name in ('main', 'more')})
    (tmp_path/'cut/main/test-00000-of-00001.parquet').write_bytes(b'PAR1')
    with pytest.raises(UserError, match='cannot be read|would not be all there'): read_items(GSM8K, f'{place}?config=main&split=test', partial=True)
    for name in ('mt-bench', 'mt-bench-tw', 'arena-hard', 'alignbench'):
        with pytest.raises(UserError, match='are files; fetch them'): read_items(find_benchmark(name), f'{place}?split=test')

def test_rows_that_do_not_say_the_right_choice_are_dropped(tmp_path):
    row = {'id': '1', 'question': '？', 'choices': ['甲', '乙']}
    items, dropped = read_items(MMLU_REDUX, write(tmp_path/'items.jsonl', [row, {**row, 'id': '2', 'answer': 1}]), partial=True)
    assert [item['gold'] for item in items] == ['B'] and dropped[0]['drop_reason'] == 'no_gold'
    nothing_true = {**TRUTHFUL[0], 'mc1_targets': {'會長出西瓜': 0, '會肚子痛': 0}}
    items, dropped = read_items(TRUTHFULQA, write(tmp_path/'truthful.jsonl', [nothing_true, TRUTHFUL[1]]), partial=True)
    assert len(items) == 1 and dropped[0]['drop_reason'] == 'no_gold'

def test_answers_of_one_token_and_of_several_share_no_batch(student):
    from kyara.evaluate import _answer_batches
    groups = {tuple(range(length)): [(length, [1])] * 6 for length in (10, 20, 21, 22, 40)}
    groups |= {tuple(range(length)): [(length, [1] * 3)] * 6 for length in (11, 23, 24)}
    batches = list(_answer_batches(groups, 12))
    assert sorted(len(prompt) for batch in batches for prompt, _ in batch) == [10, 11, 20, 21, 22, 23, 24, 40]
    # Letters count once a prompt, texts once an answer; a prompt half as long again begins a batch of its own.
    assert [[len(prompt) for prompt, _ in batch] for batch in batches] == [[10], [20, 21, 22], [40], [11], [23, 24]]

# Each of them, from a model to its figure

def items_of_all(folder):
    "Write two items of our own for each benchmark, and name their places."
    rows = {name: [row, {**row, 'id': 'lgp-test-4x4-1' if name == 'zebra-grid' else '2'}] for name, *_, row, _ in HUB}
    turn = lambda role, text: [{'role': role, 'content': text}]
    rows['math-held-out'] = [{'id': str(number), 'messages': turn('user', '臺灣有3座山，又有4座，共有幾座？') + turn('assistant', '答案：7')} for number in (1, 2)]
    rows['preference-held-out'] = [{'id': str(number), 'prompt': turn('user', '玉山有多高？'), 'chosen': turn('assistant', '3,952公尺'),
                                    'rejected': turn('assistant', '不知道')} for number in (1, 2)]
    rows['alpaca_eval'] = [{'instruction': f'用{number}句話介紹玉山。', 'output': '玉山很高。'} for number in (1, 2)]
    places = {name: str(write(folder/f'{name}.jsonl', own)) for name, own in rows.items()}
    align = folder/'align'
    bench, arena = folder/'bench', folder/'arena'
    questions = [{'question_id': number, 'category': name, 'turns': ['1+1？', '再加1？']} for number, name in ((81, 'writing'), (101, 'math'))]
    names = [f'single-{math}v1{turns}' for math in ('', 'math-') for turns in ('', '-multi-turn')]
    for name, own in (('question', questions), ('reference_answer', [{'question_id': 101, 'choices': [{'turns': ['2', '3']}]}]),
                      ('judge_prompts', [{'name': name, 'system_prompt': '評分。', 'prompt_template': '{question}{answer}'} for name in names])):
        write(bench/f'{name}.jsonl', own)
    write(arena/'question.jsonl', [{'uid': str(number), 'prompt': '推薦一道小吃。'} for number in (1, 2)])
    write(arena/'gpt-4-0314.jsonl', [{'uid': str(number), 'messages': turn('assistant', '牛肉湯。')} for number in (1, 2)])
    places |= {'arena-hard': str(arena), 'mt-bench': str(bench), 'alignbench': str(align_folder(align))}
    family = lambda name: max((known for known in places if name.startswith(known)), key=len)
    return {name: places[family(name)] for name in BENCHMARKS}

VERDICTS = {'mt-bench': '[[7]]', 'mt-bench-tw': '[[7]]', 'arena-hard': '[[B>A]]', 'alpaca_eval': 'm', 'chinese-reason-bench': '{"judge_score": 7}'}

def test_every_benchmark_goes_from_a_model_to_its_figure(student, tmp_path):
    paths = items_of_all(tmp_path)
    transcripts, dropped, cost = evaluate_models({'學生': student}, paths, tmp_path/'ledger.sqlite', max_tokens=4, partial=True)
    assert not dropped and not cost and {row['benchmark'] for row in transcripts} == BENCHMARKS.keys()
    judgements = []
    for name, benchmark in BENCHMARKS.items():
        if not benchmark.judge: continue
        own = [row for row in transcripts if row['benchmark'] == name]
        judge = Scripted([VERDICTS.get(name, "{'综合得分': 7}")] * 20)
        judgements += named(run_judging(benchmark, read_items(benchmark, paths[name], partial=True)[0], own, judge)[0], '學生')
    scores = figures(transcripts, judgements=judgements)['學生']
    assert scores.keys() == BENCHMARKS.keys()
    for name, figure in scores.items():
        assert figure['low'] <= figure['score'] <= figure['high'] and figure['rule'] and 0 <= figure['truncated'] <= 100, (name, figure)
        assert figure.get('partial', False) == bool(BENCHMARKS[name].items) and figure['n'] == len(read_items(BENCHMARKS[name], paths[name], partial=True)[0])
    assert [scores[name]['score'] for name in ('mt-bench', 'alignbench', 'alignbench-twp', 'chinese-reason-bench', 'arena-hard')] == [7, 7, 7, 7, 50]
    for form in (comparison_table, comparison_latex, comparison_html):
        table = form({'學生': scores})
        assert all(name.replace('_', r'\_' if form is comparison_latex else '_') in table for name in BENCHMARKS)

def test_letters_by_log_likelihood(student, tmp_path):
    rows = [{'id': str(number), 'subject': 'physics', 'question': f'第{number}題', 'A': '雪山', 'B': '玉山', 'C': '合歡山', 'D': '大霸尖山', 'answer': 'B'}
            for number in range(5)]
    items, _ = read_items(TMMLUPLUS_LIKELIHOOD, write(tmp_path/'items.jsonl', rows))
    transcripts = run_choices(TMMLUPLUS_LIKELIHOOD, items, student, batch_size=8)
    assert len(transcripts) == 5 and all(row['extracted'] in tuple('ABCD') for row in transcripts)

# Scripts

def test_the_same_items_in_another_script_keep_their_ids(tmp_path):
    row = {'id': '7', 'subject': 'physics', 'question': '臺灣', 'A': '體', 'B': '乙', 'C': '丙', 'D': '丁', 'answer': 'A'}
    path = write(tmp_path/'items.jsonl', [row])
    plain, simple = (read_items(find_benchmark(name), path)[0][0] for name in ('tmmluplus', 'tmmluplus-simplified'))
    assert plain['id'] == simple['id'] == 'physics/7' and '台湾' in simple['messages'][0]['content'] and '體' not in simple['messages'][0]['content']
    assert converted(REASON, 's2twp', ('question',)).rule.endswith('s2twp') and simple['gold'] == 'A'

# Mistakes

@pytest.mark.parametrize('name,word', [('gsm8k', 'source'), ('mt-bench', 'question'), ('arena-hard', 'question'), ('alignbench', 'config'),
                                       ('alpaca_eval', 'alpaca_eval'), ('tmmluplus', '_test.csv')])
def test_missing_files_are_named_with_the_remedy(name, word, tmp_path):
    with pytest.raises(UserError, match='does not exist|source'): read_items(find_benchmark(name), tmp_path/'nowhere')
    if name == 'gsm8k': return
    with pytest.raises(UserError, match=word): read_items(find_benchmark(name), tmp_path)

def test_a_part_of_a_benchmark_is_refused_unless_told(tmp_path):
    path = write(tmp_path/'items.jsonl', [{'id': str(number), 'question': '3加4？', 'answer': '#### 7'} for number in range(3)])
    with pytest.raises(UserError, match='1319 items.*holds 3.*partial'): read_items(GSM8K, path)
    items, _ = read_items(GSM8K, path, partial=True)
    transcripts, _ = run_generation(GSM8K, items, Scripted(['{"answer": "7"}'] * 3))
    scores = figures(named(transcripts))
    assert scores['kyara']['gsm8k']['partial'] and 'partial' in comparison_table(scores)

def test_names_in_tables_are_escaped(tmp_path):
    items = read_items(GSM8K, write(tmp_path/'items.jsonl', [{'id': '1', 'question': '？', 'answer': '#### 7'}]), partial=True)[0]
    transcripts, _ = run_generation(GSM8K, items, Scripted(['7']))
    scores = figures(named(transcripts, 'a_b&<c>\\x'))
    assert r'a\_b\&<c>\textbackslash{}x' in comparison_latex(scores) and 'a_b&amp;&lt;c&gt;' in comparison_html(scores)

def test_rows_of_another_form_are_named(tmp_path):
    path = write(tmp_path/'items.jsonl', [{'id': '1', 'prompt': '3加4？'}])
    for name in ('gsm8k', 'zebra-grid', 'mmlu-redux', 'truthfulqa', 'truthfulqa-mc2', 'tmmluplus'):
        with pytest.raises(UserError, match='form|answer'): read_items(find_benchmark(name), path, partial=True)

# Through the ledger

def test_model_and_judge_pay_once(tmp_path, monkeypatch):
    "Every judgement echoes its prompt, and with it the example `[[5]]` of the template."
    from loopback import serve
    bench = tmp_path/'bench'
    write(bench/'question.jsonl', [{'question_id': 81, 'category': 'writing', 'turns': ['寫一首詩。', '再短一點。']},
                                   {'question_id': 101, 'category': 'math', 'turns': ['1+1？', '再加1？']}])
    single = {'system_prompt': '評分。', 'prompt_template': '評分如 [[5]]。{question}\n{answer}'}
    second = {'system_prompt': '評分。', 'prompt_template': '評分如 [[6]]。{question_1}{question_2}\n{answer_1}{answer_2}'}
    write(bench/'judge_prompts.jsonl', [{'name': name, **words} for name, words in (
        ('single-v1', single), ('single-math-v1', single), ('single-v1-multi-turn', second), ('single-math-v1-multi-turn', second))])
    write(bench/'reference_answer.jsonl', [{'question_id': 101, 'choices': [{'turns': ['2', '3']}]}])
    with serve() as server:
        lines = ['[model.loopback]', 'provider = openai', 'model = loopback', f'base_url = {server.url}', 'concurrency = 4']
        (tmp_path/'settings.ini').write_text('\n'.join(lines) + '\n')
        monkeypatch.setenv('KYARA_SETTINGS', str(tmp_path/'settings.ini'))
        run = lambda: evaluate_models({'echo': 'loopback'}, {'mt-bench': str(bench)}, tmp_path/'ledger.sqlite', partial=True)
        transcripts, dropped, _ = run()
        judge = lambda: judge_models(transcripts, {'mt-bench': str(bench)}, 'loopback', tmp_path/'ledger.sqlite', partial=True)
        judgements, unjudged, _ = judge()
        assert (len(transcripts), len(judgements), len(dropped), unjudged) == (2, 4, 0, [])
        before = server.stats()
        assert [*run()[0]] == [*transcripts] and judge()[0] == judgements and server.stats() == before
    got = figures(transcripts, judgements=judgements)['echo']['mt-bench']
    assert (got['score'], got['parts']) == (5.5, {'turn1': 5.0, 'turn2': 6.0}), got
    with pytest.raises(UserError, match='scored by a judge'): judge_models(transcripts, {'mt-bench': str(bench)}, '', tmp_path/'ledger.sqlite')
