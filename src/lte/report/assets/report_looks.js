'use strict';
/* How a curve looks everywhere on the page: a colour, a symbol and a dash by its place; and switching curves off. */

/* The shell has a style of its own alone; a sheet made by a script is no inline style. */
const reportSheet = new CSSStyleSheet();
reportSheet.replaceSync(Shell.data.style);
document.adoptedStyleSheets = [reportSheet];

const Looks = (() => {
  const COLOURS = 7;
  /* On a field of 20 by 20; 7 colours and 13 symbols: no pair comes again before the 92nd curve. */
  const SYMBOLS = ['M10 1A9 9 0 1 0 10 19A9 9 0 1 0 10 1Z', 'M2 2H18V18H2Z', 'M10 1L19 18H1Z',
    'M10 0L20 10L10 20L0 10Z', 'M1 2H19L10 19Z', 'M7 1H13V7H19V13H13V19H7V13H1V7H7Z',
    'M5 1L10 6L15 1L19 5L14 10L19 15L15 19L10 14L5 19L1 15L6 10L1 5Z',
    'M10 0L12.5 7H20L14 11.5L16.5 19L10 14.5L3.5 19L6 11.5L0 7H7.5Z', 'M1 10L18 1V19Z', 'M10 0L19 5V15L10 20L1 15V5Z',
    'M19 10L2 1V19Z', 'M10 0L20 7.5L16 19H4L0 7.5Z', 'M10 0L16 10L10 20L4 10Z'];
  const DASHES = ['solid', 'dashed', 'dotted', [9, 3, 2, 3]];
  const ICON_DASHES = { solid: 'none', dashed: '10 5', dotted: '4 4' };
  /* Dense models are lines in the colour of text, told apart by their dashes. */
  const DENSE_DASHES = ['dashed', 'dotted', [9, 3, 2, 3], 'solid'];
  const dense = (place) => ({ colour: Shell.colour('quiet'), dash: DENSE_DASHES[place % DENSE_DASHES.length],
    symbol: 'path://M8 0H12V20H8Z', path: 'M0 10H40', variable: '--quiet', isLine: true });

  function of(name) {
    const place = Shell.data.places[name] ?? 0;
    const path = SYMBOLS[place % SYMBOLS.length];
    return { colour: Shell.colour(`curve-${place % COLOURS}`), path, symbol: `path://${path}`, variable: `--curve-${place % COLOURS}`,
      dash: DASHES[Math.floor(place / COLOURS) % DASHES.length] };
  }

  /* What is no method, a setting say: by its place among `count`, in the stronger half of the ramp. */
  function setting(place, count) {
    const strong = Shell.ramp().slice(4);
    return { colour: strong[Math.round((place / Math.max(count - 1, 1)) * (strong.length - 1))],
      symbol: `path://${SYMBOLS[place % SYMBOLS.length]}` };
  }

  /* A curve's symbol, or the dash of a line, as a picture beside its name. */
  function icon({ path, variable, isLine = false, dash }, hollow = false) {
    const make = (name) => document.createElementNS('http://www.w3.org/2000/svg', name);
    const [box, shape] = [make('svg'), make('path')];
    box.setAttribute('viewBox', isLine ? '0 0 40 20' : '-2 -2 24 24');
    box.setAttribute('aria-hidden', 'true');
    box.classList.toggle('line', isLine);
    shape.setAttribute('d', path);
    shape.style.fill = hollow ? 'none' : `var(${variable})`;
    shape.style.stroke = `var(${variable})`;
    shape.style.strokeWidth = hollow ? '3' : isLine ? '4' : '1';
    if (isLine) shape.style.strokeDasharray = ICON_DASHES[dash] ?? '14 5 3 5';
    box.append(shape);
    return box;
  }

  /* ECharts' style of a symbol. */
  const symbol = (look, hollow = false) => ({ symbol: look.symbol, symbolKeepAspect: true, symbolSize: hollow ? 14 : 11,
    itemStyle: hollow ? { color: 'transparent', borderColor: look.colour, borderWidth: 2, opacity: 1 }
      : { color: look.colour } });

  return { of, dense, setting, icon, symbol };
})();

/* Buttons that switch curves off and on; what is off is remembered by name, whichever task is shown. */
class Switches {
  constructor(legend) {
    Object.assign(this, { legend, off: new Set(), listeners: new Set(), buttons: new Map() });
    this.chips = Shell.element('div', { class: 'chips' });
    this.box = Shell.element('fieldset', {}, Shell.element('legend', {}, legend), this.chips);
  }

  /* entries: { name, look, hollow, label }. */
  fill(entries) {
    this.buttons.clear();
    this.listeners.clear();
    const all = ['Show all', 'Hide all'].map((text, place) => {
      const button = Shell.element('button', { type: 'button', class: 'chip all' }, text);
      button.addEventListener('click', () => this.set(entries.map(({ name }) => name), place === 0));
      return button;
    });
    const chips = entries.map(({ name, look, hollow, label }) => {
      const button = Shell.element('button', { type: 'button', class: 'chip', 'aria-pressed': String(this.isOn(name)) },
        Looks.icon(look, hollow), Shell.element('span', { class: 'clamped', title: label ?? name }, label ?? name));
      button.addEventListener('click', () => this.set([name], !this.isOn(name)));
      this.buttons.set(name, button);
      return button;
    });
    this.chips.replaceChildren(...chips, ...(entries.length > 2 ? all : []));
    this.box.hidden = entries.length < 2;
  }

  isOn(name) {
    return !this.off.has(name);
  }

  set(names, on) {
    for (const name of names) {
      if (on) this.off.delete(name);
      else this.off.add(name);
      this.buttons.get(name)?.setAttribute('aria-pressed', String(on));
    }
    this.listeners.forEach((listener) => listener());
  }

  onChange(listener) {
    this.listeners.add(listener);
  }
}

/* Axes, bars and words that several pictures need. */
const Draw = (() => {
  const isNumber = (value) => typeof value === 'number' && Number.isFinite(value);
  const short = (value) => (isNumber(value) ? String(Number(value.toPrecision(4))) : '-');
  const clip = (text, length = 60) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

  /* A value axis around numbers: logarithmic where `ratio` says that they are too far apart. */
  function valueAxis(name, values, { ratio = Infinity, fromZero = false } = {}) {
    const known = values.filter(isNumber);
    const [low, high] = known.length ? [Math.min(...known), Math.max(...known)] : [0, 1];
    /* The ends are no round numbers. */
    const axisLabel = { formatter: short, hideOverlap: true, showMaxLabel: false };
    if (low > 0 && high > ratio * low) {
      const logBase = high > 64 * low ? 10 : 2;
      return axis(name, { type: 'log', logBase, min: low / 1.15, max: high * 1.15, axisLabel: { ...axisLabel,
        showMinLabel: false } });
    }
    const margin = (high - low || Math.abs(high) || 1) * 0.08;
    return axis(name, { type: 'value', min: fromZero ? 0 : low - margin, max: high + margin, axisLabel: { ...axisLabel,
      showMinLabel: fromZero } });
  }

  const shareAxis = (name, settings = {}) => axis(name, { type: 'value', min: 0, max: 1,
    axisLabel: { formatter: (value) => `${Math.round(100 * value)}%` }, ...settings });

  /* A vertical axis with its name above the picture, where it has room to the right. */
  function axis(name, settings) {
    const made = Shell.axis({ name, nameLocation: 'end', ...settings });
    return { ...made, nameTextStyle: { ...made.nameTextStyle, align: made.nameLocation === 'middle' ? 'center'
      : 'left' } };
  }

  const below = (name) => ({ name, nameLocation: 'middle', nameGap: 28 });

  /* Bars of errors; an item is [x, y, lowest x, highest x, lowest y, highest y]. */
  function errorBars(items, colours) {
    return { type: 'custom', silent: true, z: 3, clip: true, data: items, encode: { x: [0, 2, 3], y: [1, 4, 5] },
      tooltip: { show: false },
      renderItem: (params, api) => {
        const [x, y, left, right, low, high] = [0, 1, 2, 3, 4, 5].map((place) => api.value(place));
        const style = { stroke: colours[params.dataIndex], lineWidth: 1.5 };
        const line = (from, to, cap) => {
          const [[x1, y1], [x2, y2]] = [api.coord(from), api.coord(to)];
          return [[x1, y1, x2, y2], [x1 - cap[0], y1 - cap[1], x1 + cap[0], y1 + cap[1]],
            [x2 - cap[0], y2 - cap[1], x2 + cap[0], y2 + cap[1]]]
            .map(([a, b, c, d]) => ({ type: 'line', shape: { x1: a, y1: b, x2: c, y2: d }, style }));
        };
        const children = [...(high > low ? line([x, low], [x, high], [4, 0]) : []),
          ...(right > left ? line([left, y], [right, y], [0, 4]) : [])];
        return { type: 'group', children };
      } };
  }

  /* A line at a share of the axis from the first to the last bin of a histogram, on a band that sets it off. */
  function threshold(share) {
    return { type: 'custom', silent: true, z: 5, data: [[0, 0]], tooltip: { show: false },
      renderItem: ({ coordSys: { x, y, width, height } }) => {
        const at = x + share * width;
        const line = (style) => ({ type: 'line', shape: { x1: at, x2: at, y1: y, y2: y + height }, style });
        return { type: 'group', children: [line({ stroke: Shell.colour('paper'), lineWidth: 5 }),
          line({ stroke: Shell.colour('second'), lineWidth: 2.5, lineDash: [6, 4] })] };
      } };
  }

  /* Horizontal lines; at two decimals, which ECharts would round to, they would lie beside their points. */
  const lines = (values, lineStyle) => ({ precision: 12, silent: true, symbol: 'none', label: { show: false }, lineStyle,
    data: values.map((yAxis) => ({ yAxis })) });

  /* What stands in a picture without a point. */
  const nothing = (text) => ({ title: { text, left: 'center', top: 'middle',
    textStyle: { color: Shell.colour('quiet'), fontSize: 14, fontWeight: 'normal' } } });

  return { isNumber, short, clip, axis, valueAxis, shareAxis, below, errorBars, threshold, lines, nothing };
})();

/* A drop-down list; entries are [text, value]. */
function choiceOf(label, entries, onChange) {
  const select = Shell.element('select', {}, ...entries.map(([text], place) =>
    Shell.element('option', { value: String(place) }, text)));
  select.addEventListener('change', () => onChange(entries[Number(select.value)][1]));
  return { select, box: Shell.element('label', { hidden: entries.length < 2 }, `${label} `, select) };
}
