'use strict';
/* What all pages share: building elements, the theme, pictures with a caption and a table, numbers as text. */
const Shell = (() => {
  const data = JSON.parse(document.getElementById('page-data').textContent);
  const pictures = new Set();

  /* An element; strings among the children become text, never markup. */
  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value === true) made.setAttribute(key, '');
      else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  /* The colour that a custom property has in the present theme. */
  function colour(name) {
    const probe = element('span', { hidden: true });
    probe.style.color = `var(--${name})`;
    document.body.append(probe);
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  }

  /* A name as children of an element: it may break after each underscore and slash before it breaks within a word. */
  function breakable(text) {
    return text.split(/(?<=[_/])/).flatMap((part, place) => (place ? [element('wbr'), part] : [part]));
  }

  const prefersDark = matchMedia('(prefers-color-scheme: dark)');

  function isDark() {
    return (document.documentElement.dataset.theme || (prefersDark.matches ? 'dark' : 'light')) === 'dark';
  }

  /* Cividis: it rises evenly in lightness, also for colour-blind eyes. More is darker on white and lighter on black. */
  const CIVIDIS = ['#00224e', '#123570', '#3b496c', '#575d6d', '#707173', '#8a8678', '#a59c74', '#c3b369', '#e1cc55',
    '#fee838'];

  function ramp() {
    return isDark() ? CIVIDIS : [...CIVIDIS].reverse();
  }

  /* The ramp's colour at a share in [0, 1], as three numbers. */
  function rampColour(share) {
    const colours = ramp();
    const place = Math.min(Math.max(share, 0), 1) * (colours.length - 1);
    const below = Math.min(Math.floor(place), colours.length - 2);
    const parts = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
    const [low, high] = [parts(colours[below]), parts(colours[below + 1])];
    return low.map((value, index) => Math.round(value + (high[index] - value) * (place - below)));
  }

  /* Black or white, whichever reads better on a colour (WCAG's relative luminance). */
  function inkOn(rgb) {
    const linear = rgb.map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179 ? '#000000' : '#ffffff';
  }

  const whole = new Intl.NumberFormat('en');
  const count = (value) => whole.format(value);
  const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;

  /* A table's caption, which stays in sight while the table scrolls sideways. */
  function captionOf(title, attributes = {}) {
    return element('caption', attributes, element('span', {}, title));
  }

  /* A table; a cell is text, or { words } for text that is not a number, or { mark: [before, marked, after] }. */
  function table(title, headings, rows) {
    const head = headings.map((name) => element('th', { scope: 'col', class: name.words !== undefined && 'words' }, name.words ?? name));
    const body = rows.map((row) => element('tr', {}, ...row.map((value, index) => cell(value, index === 0))));
    return element('table', {}, captionOf(title), element('thead', {}, element('tr', {}, ...head)),
      element('tbody', {}, ...body));
  }

  function cell(value, first) {
    if (value !== null && typeof value === 'object') {
      const [before, marked, after] = value.mark ?? [value.words, '', ''];
      return element('td', { class: 'words', dir: 'auto' }, before, ...(marked ? [element('mark', {}, marked)] : []), after);
    }
    return first ? element('th', { scope: 'row' }, String(value)) : element('td', {}, String(value));
  }

  /* A box that scrolls by itself and that the keyboard reaches. */
  function scrollBox(label, ...children) {
    return element('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': label }, ...children);
  }

  /* A picture with its sentence and its table.
     options: what ECharts draws, made anew for each draw. rows: the table's title, headings and rows.
     height: in pixels, for a width. onPick: called with the parameters of a click. */
  class Picture {
    constructor({ label, caption, options, rows, height, onPick = null }) {
      Object.assign(this, { options, rows, height });
      this.plot = element('div', { class: 'plot', role: 'img', 'aria-label': label });
      this.tableBox = scrollBox(`${label}, as a table`);
      this.details = element('details', {}, element('summary', {}, 'Show as table'), this.tableBox);
      this.box = element('div', {}, this.plot, element('p', { class: 'caption' }, caption), this.details);
      this.details.addEventListener('toggle', () => this.fillTable());
      this.onPick = onPick;
      this.width = 0;
      pictures.add(this);
      this.observer = new ResizeObserver(() => {
        if (Math.abs(this.plot.clientWidth - this.width) > 1) this.draw();
      });
      this.observer.observe(this.plot);
    }

    draw() {
      this.width = this.plot.clientWidth;
      if (!this.width) return;
      const height = this.height(this.width);
      this.plot.style.height = `${height}px`;
      if (!this.chart) {
        this.chart = echarts.init(this.plot, null, { renderer: 'canvas' });
        if (this.onPick) this.chart.on('click', this.onPick);
      }
      this.chart.resize({ width: this.width, height });
      const base = { animation: false, textStyle: { color: colour('ink'), fontFamily: 'system-ui, sans-serif' } };
      this.chart.setOption({ ...base, ...this.options(this.width) }, true);
      this.fillTable();
    }

    /* Draws with the next frame, once, however often it is asked for until then. */
    drawSoon() {
      cancelAnimationFrame(this.frame);
      this.frame = requestAnimationFrame(() => this.draw());
    }

    fillTable() {
      if (this.details.open) this.tableBox.replaceChildren(table(...this.rows()));
    }

    remove() {
      this.observer.disconnect();
      cancelAnimationFrame(this.frame);
      this.chart?.dispose();
      pictures.delete(this);
    }
  }

  /* Axis and tooltip as all pictures have them. Tooltips are drawn on the canvas: no text becomes markup. */
  function axis(settings) {
    const line = { lineStyle: { color: colour('line') } };
    return { axisLine: line, axisTick: line, splitLine: { show: false }, ...settings,
      axisLabel: { color: colour('quiet'), ...settings.axisLabel }, nameTextStyle: { color: colour('quiet') } };
  }

  function tooltip(formatter, settings = {}) {
    return { renderMode: 'richText', confine: true, backgroundColor: colour('paper'), borderColor: colour('line'),
      textStyle: { color: colour('ink') }, formatter, ...settings };
  }

  const listeners = new Set();
  const onTheme = (listener) => listeners.add(listener);

  function redraw() {
    listeners.forEach((listener) => listener());
    pictures.forEach((picture) => picture.draw());
  }

  const theme = document.getElementById('theme');
  theme.addEventListener('change', () => {
    if (theme.value) document.documentElement.dataset.theme = theme.value;
    else delete document.documentElement.dataset.theme;
    redraw();
  });
  prefersDark.addEventListener('change', redraw);

  function clearPictures() {
    pictures.forEach((picture) => picture.remove());
    listeners.clear();
  }

  return { data, element, breakable, captionOf, colour, isDark, ramp, rampColour, inkOn, count, percent, table,
    scrollBox, Picture, axis, tooltip, onTheme, clearPictures };
})();
