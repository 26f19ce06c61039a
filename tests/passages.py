"""Documents that the tests of corpus and index share."""
from pathlib import Path

import pytest

DRCD = Path(__file__).parents[2] / 'shared/data/drcd/DRCD_dev.json.gz'
needs_drcd = pytest.mark.skipif(not DRCD.exists(), reason=f'no DRCD data at {DRCD}')
MOUNTAIN = {'doc_id': 'yushan', 'title': '玉山', 'text': '玉山是臺灣最高的山，主峰海拔3,952公尺。玉山國家公園成立於1985年。'}
RIVER = {'doc_id': 'zhuoshui', 'title': '濁水溪', 'text': '濁水溪是臺灣最長的河川，全長約186公里。濁水溪注入臺灣海峽。'}
RAILWAY = {'doc_id': 'alishan', 'title': '阿里山林業鐵路', 'text': '阿里山林業鐵路連接嘉義市與阿里山。鐵路的軌距為762公釐。'}
DOCUMENTS = [MOUNTAIN, RIVER, RAILWAY]

def split(pairs):
    pairs = list(pairs)
    return [document for document, _ in pairs if document], [row for _, row in pairs if row]
