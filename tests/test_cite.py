"Hard cases of the citation check; each row names what is wrong with the claim."
import time

import pytest

from kyara.cite import check_citations, citation_gate, split_claims
from kyara.core import UserError

DOCUMENTS = {
    'id_27025b13': '玉山主峰海拔3,952公尺，是臺灣最高峰。玉山國家公園成立於1985年，面積約10萬5,000公頃，每年吸引約一百萬名遊客。園區內禁止採集植物。',
    'id_0a1b2c3d': '雪山主峰海拔3,886公尺，是臺灣第二高峰，位於臺中市與苗栗縣交界。1999年地震後，登山步道關閉了兩年，但是山屋並未受損。',
    'dq945509': '奇美博物館由許文龍創辦，位於臺南市仁德區，收藏羅丹的《沉思者》。2015年參觀人數比前一年增加12%，門票為200元。館方允許民眾拍照。'}

TABLE = [
    ('the sentence itself', '玉山主峰海拔3,952公尺，是臺灣最高峰', 'id_27025b13', 'supported', ''),
    ('another unit', '玉山主峰海拔3.952公里', 'id_27025b13', 'supported', ''),
    ('Chinese numerals', '玉山國家公園面積約十萬五千公頃', 'id_27025b13', 'supported', ''),
    ('Republic year', '玉山國家公園成立於民國74年', 'id_27025b13', 'supported', ''),
    ('Simplified answer', '玉山国家公园成立于1985年', 'id_27025b13', 'supported', ''),
    ('reordered', '是臺灣最高峰的玉山，主峰海拔3,952公尺', 'id_27025b13', 'supported', ''),
    ('percent in words', '2015年參觀人數比前一年增加百分之十二', 'dq945509', 'supported', ''),
    ('negation kept', '地震後山屋並未受損', 'id_0a1b2c3d', 'supported', ''),
    ('negation in other words', '地震後山屋沒有受損', 'id_0a1b2c3d', 'supported', ''),
    ('title kept', '奇美博物館收藏羅丹的《沉思者》', 'dq945509', 'supported', ''),
    ('half a sentence', '登山步道關閉了2年', 'id_0a1b2c3d', 'supported', ''),
    ('digits swapped', '玉山主峰海拔3,925公尺', 'id_27025b13', 'contradicted', '3,952公尺'),
    ('unit changed', '玉山主峰海拔3,952公里', 'id_27025b13', 'contradicted', '3,952公尺'),
    ('year changed', '玉山國家公園成立於1986年', 'id_27025b13', 'contradicted', '1985年'),
    ('Republic year changed', '玉山國家公園成立於民國75年', 'id_27025b13', 'contradicted', '1985年'),
    ('share changed', '2015年參觀人數比前一年增加20%', 'dq945509', 'contradicted', '12%'),
    ('price changed', '奇美博物館門票為250元', 'dq945509', 'contradicted', '200元'),
    ('price in another currency', '奇美博物館門票為200美元', 'dq945509', 'contradicted', '200美元'),
    ('ten times', '玉山國家公園每年吸引約一千萬名遊客', 'id_27025b13', 'contradicted', '一百萬名'),
    ('ordinal changed', '雪山是臺灣第三高峰', 'id_0a1b2c3d', 'contradicted', '第二'),
    ('duration changed', '地震後登山步道關閉了三年', 'id_0a1b2c3d', 'contradicted', '兩年'),
    ('opposite', '2015年參觀人數比前一年減少12%', 'dq945509', 'contradicted', '增加'),
    ('superlative turned', '玉山主峰海拔3,952公尺，是臺灣最低峰', 'id_27025b13', 'contradicted', '最低'),
    ('allowed for forbidden', '玉山國家公園園區內允許採集植物', 'id_27025b13', 'contradicted', '禁止'),
    ('negation added', '奇美博物館館方不允許民眾拍照', 'dq945509', 'contradicted', '允許'),
    ('negation removed', '地震後，登山步道關閉了兩年，山屋受損', 'id_0a1b2c3d', 'contradicted', '受損'),
    ('other person', '奇美博物館由郭台銘創辦', 'dq945509', 'contradicted', '郭台銘'),
    ('other title', '奇美博物館收藏羅丹的《地獄門》', 'dq945509', 'contradicted', '《地獄門》'),
    ('wrong document', '雪山主峰海拔3,886公尺，是臺灣第二高峰', 'id_27025b13', 'unsupported', 'id_0a1b2c3d'),
    ('not in any document', '阿里山森林鐵路以櫻花與日出聞名', 'id_27025b13', 'unsupported', ''),
    ('unknown id', '玉山主峰海拔3,952公尺', 'id_99999999', 'unknown_id', 'id_99999999'),
    ('one of two ids unknown', '玉山主峰海拔3,952公尺', 'id_27025b13、id_99999999', 'unknown_id', 'id_99999999'),
    ('no citation', '玉山主峰海拔3,952公尺', '', 'uncited', ''),
]


@pytest.mark.parametrize('why, claim, cited, verdict, reason', TABLE, ids=[row[0] for row in TABLE])
def test_verdicts(why, claim, cited, verdict, reason):
    got = check_citations(f'{claim}【{cited}】。' if cited else f'{claim}。', DOCUMENTS)
    assert len(got) == 1 and got[0].verdict == verdict, (why, got)
    assert fold(reason) in fold(got[0].reason), (why, got)


def fold(text):
    from kyara.zh import fold_script
    return fold_script(text)


@pytest.mark.parametrize('why, answer, want', [
    ('citation before the stop', '甲山海拔很高又冷【id_1】。', [('甲山海拔很高又冷', ['id_1'])]),
    ('citation behind the stop', '甲山海拔很高又冷。【id_1】', [('甲山海拔很高又冷', ['id_1'])]),
    ('several brackets', '甲山海拔很高又冷【id_1】【dq2】。', [('甲山海拔很高又冷', ['id_1', 'dq2'])]),
    ('several ids in one bracket', '甲山海拔很高又冷【id_1、dq2】。', [('甲山海拔很高又冷', ['id_1', 'dq2'])]),
    ('two claims in a sentence', '甲山很高【id_1】，乙山很冷【id_2】。', [('甲山很高', ['id_1']), ('乙山很冷', ['id_2'])]),
    ('label inside the brackets', '甲山海拔很高又冷【文件ID:id_1】。', [('甲山海拔很高又冷', ['id_1'])]),
    ('list, emphasis and heading', '## 甲山\n- **甲山**海拔很高又冷【id_1】', [('甲山海拔很高又冷', ['id_1'])]),
    ('opening, question and conclusion', '以下是說明：\n甲山高不高呢？\n總之，甲山值得一去。', []),
    ('refusal', '參考文件缺乏與問題相關資訊', []), ('refusal in quotation marks', '「參考文件缺乏與問題相關資訊」。', []),
    ('heading in brackets', '【重點整理】\n甲山海拔很高又冷【id_1】', [('甲山海拔很高又冷', ['id_1'])])])
def test_split_claims(why, answer, want):
    assert split_claims(answer) == want, why


def test_gate():
    assert citation_gate('參考文件缺乏與問題相關資訊', DOCUMENTS) == '', 'a refusal passes'
    assert citation_gate('', DOCUMENTS).startswith('no_claims'), 'nothing said'
    assert citation_gate('玉山是臺灣最高峰【id_27025b13】。', DOCUMENTS) == '', 'a true claim passes'
    assert citation_gate('玉山是臺灣最高峰【id_27025b13】。玉山主峰海拔3,925公尺【id_27025b13】。', DOCUMENTS).startswith('contradicted')


def test_documents_without_id_are_refused():
    with pytest.raises(UserError, match='document 1 has no id'): check_citations('甲', [{'text': '乙'}])


@pytest.mark.parametrize('unit', ['.', '1', '【id_1', '。', ' ', '甲，'])
def test_no_answer_is_slow(unit):
    text = unit * (10_000 // len(unit))
    started = time.process_time()
    check_citations(text, {'id_1': text})
    assert time.process_time() - started < 5, unit
