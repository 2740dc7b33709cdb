'use strict';
/* What all pages share: building elements, the address, the theme, pictures with a caption and a table, numbers as
   text. */
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

  /* content: a text, or children. */
  function button(content, onClick, label = null) {
    const made = element('button', { type: 'button', 'aria-label': label }, ...[content].flat());
    made.addEventListener('click', onClick);
    return made;
  }

  /* A dot in the colour of a custom property. */
  function dot(name) {
    const made = element('span', { class: 'dot' });
    made.style.background = `var(--${name})`;
    return made;
  }

  /* What the address keeps behind its #: `task=stsb&theme=dark`. A link and a reload show the same page again. */
  const state = {
    all: () => new URLSearchParams(location.hash.slice(1)),
    get: (name, otherwise = null) => state.all().get(name) ?? otherwise,
    href(changes) {
      const found = state.all();
      for (const [name, value] of Object.entries(changes)) {
        if (value === null || value === '') found.delete(name);
        else found.set(name, value);
      }
      return `#${found}`;
    },
    /* Tells no listener: who sets something shows it. */
    set: (changes) => history.replaceState(null, '', state.href(changes)),
    /* When another address is followed, a link on the page say. */
    onChange: (listener) => addEventListener('hashchange', listener),
  };

  /* The link to the content moves there and leaves the address alone. */
  document.querySelector('.skip').addEventListener('click', (event) => {
    event.preventDefault();
    const main = document.getElementById('main');
    main.tabIndex = -1;
    main.focus();
  });

  /* What Python's pack_base64 packed; browsers from before 2025 lack the first. */
  const bytesOf = (text) => Uint8Array.fromBase64?.(text) ?? Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));

  /* What Python's pack_json packed. */
  const unpack = (text) => new Response(new Blob([bytesOf(text)]).stream()
    .pipeThrough(new DecompressionStream('deflate'))).json();

  /* The colour that a custom property has in the present theme. */
  const colours = new Map();
  function colour(name) {
    if (!colours.has(name)) {
      const probe = element('span', { hidden: true });
      probe.style.color = `var(--${name})`;
      document.body.append(probe);
      colours.set(name, getComputedStyle(probe).color);
      probe.remove();
    }
    return colours.get(name);
  }

  /* A drop-down list; entries are [text, value]. With a name the address keeps what is chosen, by its text, where it is
     not the place `chosen` to begin with. */
  function choice(label, entries, onChange, { name = null, chosen = 0 } = {}) {
    const select = element('select', {}, ...entries.map(([text]) => element('option', {}, text)));
    const kept = name ? entries.findIndex(([text]) => text === state.get(name)) : -1;
    select.selectedIndex = kept < 0 ? chosen : kept;
    select.addEventListener('change', () => {
      if (name) state.set({ [name]: select.selectedIndex === chosen ? null : select.value });
      onChange(entries[select.selectedIndex][1]);
    });
    return { select, box: element('label', { hidden: entries.length < 2 }, `${label} `, select),
      value: entries[select.selectedIndex]?.[1] };
  }

  /* Of elements that stand in lines the nearest to one of them in the line above (-1) or below (1), if there is one. */
  function lineAway(elements, from, sign) {
    const place = (each) => {
      const { x, y, width, height } = each.getClientRects()[0];
      return { each, middle: x + width / 2, line: sign * (y + height / 2) };
    };
    const here = place(from);
    const away = elements.map(place).filter(({ line }) => line > here.line + 4);
    const next = Math.min(...away.map(({ line }) => line)) + 4;
    const far = ({ middle }) => Math.abs(middle - here.middle);
    return away.filter(({ line }) => line < next).sort((a, b) => far(a) - far(b))[0]?.each;
  }

  /* Makes one tab stop of what a box holds; arrow keys, Home and End move within it. */
  function rove(box, selector) {
    const all = () => [...box.querySelectorAll(selector)].filter((each) => each.offsetParent);
    const stop = (goal) => all().forEach((each) => { each.tabIndex = each === goal ? 0 : -1; });
    box.querySelectorAll(selector).forEach((each, place) => { each.tabIndex = place ? -1 : 0; });
    box.addEventListener('focusin', (event) => event.target.matches(selector) && stop(event.target));
    box.addEventListener('keydown', (event) => {
      const found = all();
      const place = found.indexOf(event.target);
      if (place < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
      const goal = { ArrowLeft: () => found[place - 1], ArrowRight: () => found[place + 1], Home: () => found[0],
        End: () => found.at(-1), ArrowUp: () => lineAway(found, event.target, -1),
        ArrowDown: () => lineAway(found, event.target, 1) }[event.key]?.();
      if (goal) {
        event.preventDefault();
        goal.focus();
      }
    });
  }

  /* A name as children of an element: it may break after each underscore and slash before it breaks within a word. */
  function breakable(text) {
    return text.split(/(?<=[_/])/).flatMap((part, place) => (place ? [element('wbr'), part] : [part]));
  }

  /* From little to much: darker on white, and lighter on black. */
  const ramp = () => Array.from({ length: 10 }, (_, step) => colour(`ramp-${step}`));

  const whole = new Intl.NumberFormat('en');
  const count = (value) => whole.format(value);
  const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;

  /* A table; a cell is a text, an element, or words, which are no number: { words } with a text or a list of children;
     a heading is one of these, too. The cells of the first column head their rows. */
  function table(title, headings, rows) {
    const cell = (value, name, scope = null) => {
      const isWords = value?.words !== undefined;
      return element(name, { scope, class: isWords && 'words', dir: isWords && 'auto' },
        ...[isWords ? value.words : value].flat());
    };
    const head = headings.map((value) => cell(value, 'th', 'col'));
    const body = rows.map(([first, ...others]) => element('tr', {}, cell(first, 'th', 'row'),
      ...others.map((value) => cell(value, 'td'))));
    return element('table', {}, element('caption', {}, element('span', {}, title)),
      element('thead', {}, element('tr', {}, ...head)), element('tbody', {}, ...body));
  }

  /* A box that scrolls by itself and that the keyboard reaches. */
  function scrollBox(label, ...children) {
    return element('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': label }, ...children);
  }

  /* A picture with its sentence and its table. The keyboard reaches its items: arrow keys walk, Enter is a click.
     options: what ECharts draws, made anew for each draw. rows: the table's title, headings and rows.
     height: in pixels, for a width. onPick: called with the parameters of a click. chosen: tells the items to mark,
     each as { seriesIndex, dataIndex }, where -1 is none. */
  class Picture {
    constructor({ label, caption, options, rows, height, onPick = null, chosen = () => [] }) {
      Object.assign(this, { options, rows, height, onPick, chosen });
      Object.assign(this, { item: null, width: 0, isNear: false, isStale: true });
      this.plot = element('div', { class: 'plot', role: 'application', tabindex: '0', 'aria-label': label,
        'aria-roledescription': 'chart' });
      this.told = element('p', { class: 'unseen', 'aria-live': 'polite' });
      this.tableBox = scrollBox(`${label}, as a table`);
      const saves = ['PNG', 'SVG'].map((kind) => button(`Save as ${kind}`, () => this.save(kind)));
      this.details = element('details', {}, element('summary', {}, 'Show as table'),
        element('div', { class: 'controls' }, ...saves), this.tableBox);
      this.box = element('div', {}, this.plot, this.told, element('p', { class: 'caption' }, caption), this.details);
      this.details.addEventListener('toggle', () => this.fillTable());
      this.plot.addEventListener('keydown', (event) => this.walk(event));
      this.plot.addEventListener('blur', () => this.leave());
      pictures.add(this);
      this.observers = [
        new ResizeObserver(() => {
          if (Math.abs(this.plot.clientWidth - this.width) > 1) this.draw();
        }),
        new IntersectionObserver((entries) => {
          this.isNear = entries.at(-1).isIntersecting;
          if (this.isNear && this.isStale) this.draw();
        }, { rootMargin: '100px' }),
      ];
      this.observers.forEach((observer) => observer.observe(this.plot));
    }

    /* Draws, at once if the picture is on the screen or asked for, else when it comes there. */
    draw(isWanted = this.isNear) {
      this.width = this.plot.clientWidth;
      this.fillTable();
      if (!this.width) return;
      const height = this.height(this.width);
      this.plot.style.height = `${height}px`;
      this.isStale = !isWanted;
      if (this.isStale) return;
      if (!this.chart) {
        this.chart = echarts.init(this.plot, null, { renderer: 'canvas' });
        if (this.onPick) this.chart.on('click', this.onPick);
      }
      this.chart.resize({ width: this.width, height });
      const base = { animation: false, textStyle: { color: colour('ink'), fontFamily: 'system-ui, sans-serif' } };
      this.chart.setOption({ ...base, ...this.options(this.width) }, true);
      this.mark();
    }

    /* Marks what is chosen now, without drawing anew. */
    mark() {
      this.chart?.dispatchAction({ type: 'downplay' });
      this.chosen().filter(({ dataIndex }) => dataIndex !== -1)
        .forEach((item) => this.chart?.dispatchAction({ type: 'highlight', ...item }));
    }

    /* Items by series: those that a mouse would reach. */
    items() {
      return this.chart.getOption().series.map(({ data, silent, name }, seriesIndex) => (silent ? [] : data ?? []).map(
        (each, dataIndex) => ({ seriesIndex, dataIndex, seriesName: name, name: each?.name ?? '', data: each,
          value: each?.value ?? each }))).filter((found) => found.length);
    }

    walk(event) {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
        Enter: [0, 0] }[event.key];
      if (!step || !this.chart || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      const found = this.items();
      if (!found.length) return;
      if (event.key === 'Enter') {
        if (this.item) this.onPick?.(this.item);
        return;
      }
      const row = Math.max(found.findIndex(([first]) => first.seriesIndex === this.item?.seriesIndex), 0);
      const goal = this.item ? found[(row + step[0] + found.length) % found.length] : found[0];
      const place = this.item ? this.item.dataIndex + step[1] : 0;
      this.leave();
      this.item = goal[Math.min(Math.max(place, 0), goal.length - 1)];
      const { seriesIndex, dataIndex } = this.item;
      for (const type of ['highlight', 'showTip']) this.chart.dispatchAction({ type, seriesIndex, dataIndex });
      const { formatter } = this.chart.getOption().tooltip?.[0] ?? {};
      this.told.textContent = typeof formatter === 'function' ? formatter(this.item) : String(this.item.value);
    }

    leave() {
      if (this.item) this.chart?.dispatchAction({ type: 'hideTip' });
      this.item = null;
      this.mark();
    }

    /* A file of the picture as it would be shown now. */
    save(kind) {
      if (this.isStale) this.draw(true);
      let address = this.chart.getDataURL({ pixelRatio: 2, backgroundColor: colour('paper') });
      if (kind === 'SVG') {
        const drawn = echarts.init(null, null, { renderer: 'svg', ssr: true, width: this.width,
          height: this.plot.clientHeight });
        drawn.setOption({ ...this.chart.getOption(), backgroundColor: colour('paper') });
        address = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(drawn.renderToSVGString())}`;
        drawn.dispose();
      }
      const name = this.plot.getAttribute('aria-label').replace(/[^\w]+/g, '-').slice(0, 60).toLowerCase();
      element('a', { href: address, download: `${name}.${kind.toLowerCase()}` }).click();
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
      this.observers.forEach((observer) => observer.disconnect());
      cancelAnimationFrame(this.frame);
      this.chart?.dispose();
      pictures.delete(this);
    }
  }

  /* Axis and tooltip as all pictures have them. Tooltips are drawn on the canvas: no text becomes markup. */
  function axis(settings) {
    const line = { lineStyle: { color: colour('line') } };
    return { axisLine: line, axisTick: line, splitLine: { show: false }, ...settings,
      axisLabel: { color: colour('quiet'), ...settings.axisLabel },
      nameTextStyle: { color: colour('quiet'), ...settings.nameTextStyle } };
  }

  function tooltip(formatter, settings = {}) {
    return { renderMode: 'richText', confine: true, backgroundColor: colour('paper'), borderColor: colour('line'),
      textStyle: { color: colour('ink') }, formatter, ...settings };
  }

  function redraw() {
    colours.clear();
    pictures.forEach((picture) => picture.draw());
  }

  function showTheme(name) {
    document.documentElement.dataset.theme = name;
    redraw();
  }
  const theme = choice('Colours', [['as the system', ''], ['light', 'light'], ['dark', 'dark']], showTheme,
    { name: 'theme' });
  document.querySelector('.page-header').append(theme.box);
  showTheme(theme.value);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);

  addEventListener('beforeprint', () => pictures.forEach((picture) => picture.draw(true)));

  /* Lets go of the pictures that the page does not hold any more. */
  const clearPictures = () => pictures.forEach((picture) => picture.plot.isConnected || picture.remove());

  return { data, state, bytesOf, unpack, element, button, dot, breakable, choice, lineAway, rove, colour,
    ramp, count, percent, table, scrollBox, Picture, axis, tooltip, redraw, clearPictures };
})();
