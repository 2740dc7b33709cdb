'use strict';
/* Tables that sort by each column and copy as CSV. */

const UNITS_IN_CELLS = { k: 1e3, M: 1e6, G: 1e9 };

/* The number that a cell begins with; null for words and for "-". */
function numberIn(text) {
  const found = /^(-?[\d,]*\.?\d+(?:e[+-]?\d+)?)([kMG%]?)(?![\w])/i.exec(text);
  return found ? Number(found[1].replaceAll(',', '')) * (UNITS_IN_CELLS[found[2]] ?? 1) : null;
}

function csvOf(rows) {
  const cell = (value) => {
    const text = String(value ?? '');
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => `${row.map(cell).join(',')}\n`).join('');
}

/* Columns in which more is better, beside a metric of that kind: the first click shows the best on top. */
const MORE_IS_BETTER = ['FFN sparsity', 'weights not read', 'seeds', 'bytes saved', 'FFN bytes saved',
  'FFN sparsity there', 'target', 'on the envelope'];

class SortableTable {
  /* csv: header and `rows` for the copy, what is shown where it is left out. best: the metric. colours: of the dots
     beside names. onChoose: makes a button of the first cell, called with the row's place. */
  constructor({ title, header, rows, left, csv = [header, ...rows], best = null, colours = null, onChoose = null }) {
    Object.assign(this, { title, header, rows, left, csv, best, colours, onChoose, column: null, descending: false });
    this.order = rows.map((_, place) => place);
    const { element, button } = Shell;
    const heading = (name, column) => button(name || 'where', () => this.sort(column));
    const table = Shell.table(title, header.map((name, column) =>
      (column < left ? { words: heading(name, column) } : heading(name, column))),
    rows.map((row, place) => row.map((text, column) =>
      (column < left ? { words: column ? Shell.breakable(text) : this.name(text, place) } : text))));
    table.className = 'sortable';
    [this.headings, this.body] = [[...table.tHead.rows[0].cells], table.tBodies[0]];
    this.rowElements = [...this.body.rows];
    if (onChoose) this.rowElements.forEach((row, place) => row.addEventListener('click', () => onChoose(place)));
    this.state = element('span', { role: 'status' });
    this.fallback = element('div', {});
    this.box = element('div', {}, element('div', { class: 'controls' },
      button('Copy as CSV', () => this.copy()), this.state), this.fallback, Shell.scrollBox(title, table));
    Shell.rove(table, 'button');
  }

  name(text, place) {
    const { element } = Shell;
    const words = Shell.breakable(text);
    const name = this.onChoose ? [element('button', { type: 'button', class: 'choose' },
      element('span', { class: 'clamped', title: text }, ...words))] : words;
    return this.colours ? [element('span', { class: 'named' }, Shell.dot(this.colours[place]), ...name)] : name;
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
    this.body.replaceChildren(...this.order.map((place) => this.rowElements[place]));
  }

  csvText() {
    const [header, ...rows] = this.csv;
    return csvOf([header, ...this.order.map((place) => rows[place])]);
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
