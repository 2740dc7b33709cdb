"""What is wrong with the words on a page."""

from __future__ import annotations

from selenium.webdriver import Chrome

# ECharts takes the width of a wide character for the height of a line, which is too little where a font lacks it: a
# word is taken to be as high as its font here.
CUT = """return [...document.querySelectorAll('.plot')].filter((plot) => plot.clientWidth).flatMap((plot) => {
  const shown = echarts.getInstanceByDom(plot).getZr().storage.getDisplayList(true);
  return shown.filter(({type, style, invisible}) => type === 'tspan' && style.text && !invisible).filter((word) => {
    const box = word.getBoundingRect().clone();
    const missing = Math.max(parseFloat(/([\\d.]+)px/.exec(word.style.font)[1]) - box.height, 0);
    box.y -= missing / 2;
    box.height += missing;
    if (word.transform) box.applyTransform(word.transform);
    return box.x < -1 || box.y < -1 || box.x + box.width > plot.clientWidth + 1
      || box.y + box.height > plot.clientHeight + 1;
  }).map(({style}) => `${style.text} (${plot.getAttribute('aria-label')})`);
});"""


def cut_labels(browser: Chrome) -> list[str]:
    """The words in pictures that reach beyond the picture's edge, each with the picture's name."""
    return browser.execute_script(CUT)
