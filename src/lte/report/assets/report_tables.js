'use strict';
/* Tables that sort by each column and copy as CSV. */

const UNITS_IN_CELLS = { k: 1e3, M: 1e6, G: 1e9 };

/* The number that a cell begins with; null for words and for "-". */
function numberIn(text) {
  const found = /^(-?[\d,]*\.?\d+(?:e[+-]?\d+)?)([kMG%]?)(?![\w])/i.exec(text);
  return found ? Number(found[1].replaceAll(',', '')) * (UNITS_IN_CELLS[found[2]] ?? 1) : null;
}

function csvOf(header, rows) {
  const cell = (value) => {
    const text = value === null || value === undefined ? '' : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [header, ...rows].map((row) => `${row.map(cell).join(',')}\n`).join('');
}

/* Columns in which more is better, beside a metric of that kind: the first click shows the best on top. */
const MORE_IS_BETTER = ['FFN sparsity', 'weights not read', 'seeds', 'bytes saved', 'FFN bytes saved',
  'FFN sparsity there',
  'target', 'on the envelope'];

class SortableTable {
  /* csv: header and rows for the copy, in the order of `rows`; without it what is shown is copied.
     best: the metric. isTitled: whether a heading says the title. icon: the colour beside a name.
     onChoose: makes a button of the first cell, called with the row's place. */
  constructor({ title, isTitled = false, header, rows, left, csv = null, best = null, icon = null, onChoose = null }) {
    Object.assign(this, { title, header, rows, left, csv, best, icon, onChoose });
    this.order = rows.map((_, place) => place);
    this.column = null;
    this.descending = false;
    const { element } = Shell;
    this.headings = header.map((name, column) => {
      const button = element('button', { type: 'button' }, name || 'where');
      button.addEventListener('click', () => this.sort(column));
      return element('th', { scope: 'col', 'aria-sort': 'none', class: column < left && 'words' }, button);
    });
    this.body = element('tbody', {});
    const copy = element('button', { type: 'button' }, 'Copy as CSV');
    copy.addEventListener('click', () => this.copy());
    this.state = element('span', { role: 'status' });
    this.fallback = element('div', {});
    const table = element('table', { class: 'sortable' }, Shell.captionOf(title, { class: isTitled && 'unseen' }),
      element('thead', {}, element('tr', {}, ...this.headings)), this.body);
    this.box = element('div', {}, element('div', { class: 'table-tools' }, copy, this.state), this.fallback,
      Shell.scrollBox(title, table));
    this.rowElements = rows.map((row, place) => this.rowElement(row, place));
    this.fill();
    Shell.rove(table, 'button');
  }

  rowElement(row, place) {
    const { element } = Shell;
    const cells = row.map((text, column) => {
      if (column >= this.left && column > 0) return element('td', {}, text);
      const words = Shell.breakable(text);
      if (column > 0) return element('td', { class: 'words', dir: 'auto' }, ...words);
      const icon = this.icon && element('span', { class: 'dot' });
      if (icon) icon.style.background = this.icon(place);
      const name = this.onChoose ? [element('button', { type: 'button', class: 'choose' },
        element('span', { class: 'clamped', title: text }, ...words))] : words;
      return element('th', { scope: 'row', class: 'words', dir: 'auto' },
        ...(icon ? [element('span', { class: 'named' },
        icon, ...name)] : name));
    });
    const made = element('tr', {}, ...cells);
    if (this.onChoose) made.addEventListener('click', () => this.onChoose(place));
    return made;
  }

  fill() {
    this.body.replaceChildren(...this.order.map((place) => this.rowElements[place]));
  }

  /* The best first, then the worst; what is not known comes last both ways. */
  sort(column) {
    const more = MORE_IS_BETTER.includes(this.header[column])
      || (this.best?.higher_is_better && this.header[column] === this.best.name);
    this.descending = this.column === column ? !this.descending : Boolean(more);
    this.column = column;
    const keys = this.rows.map((row) => numberIn(row[column]));
    const sign = this.descending ? -1 : 1;
    const text = (place) => this.rows[place][column];
    const unknown = (place) => text(place) === '-' || text(place) === '';
    this.order.sort((a, b) => {
      if (unknown(a) !== unknown(b)) return unknown(a) ? 1 : -1;
      if (keys[a] !== null && keys[b] !== null && column >= this.left) return sign * (keys[a] - keys[b]) || a - b;
      return sign * text(a).localeCompare(text(b), 'en', { numeric: true }) || a - b;
    });
    this.headings.forEach((heading, place) => heading.setAttribute('aria-sort',
      place !== column ? 'none' : this.descending ? 'descending' : 'ascending'));
    this.fill();
  }

  csvText() {
    const { header, rows } = this.csv ?? this;
    return csvOf(header, this.order.map((place) => rows[place]));
  }

  /* Where the browser refuses the clipboard, the text to copy is shown, chosen. */
  async copy() {
    const text = this.csvText();
    const rows = `${Shell.count(this.rows.length)} ${this.rows.length === 1 ? 'row' : 'rows'}`;
    try {
      await navigator.clipboard.writeText(text);
      this.fallback.replaceChildren();
      this.state.textContent = `Copied ${rows}.`;
    } catch {
      const area = Shell.element('textarea', { class: 'csv', rows: '6', readonly: true,
        'aria-label': `${this.title}, as CSV` });
      area.value = text;
      this.fallback.replaceChildren(area);
      area.select();
      this.state.textContent = `This browser refused the clipboard: copy these ${rows} from the box.`;
    }
  }
}
