'use strict';
/* What the page knows of a text: its tokens, their routing and what the model expected, packed as in the data. */

const KINDS = { likeliest: Int32Array, positions: Int32Array, switched_on: Int32Array, counts: Uint16Array };
const numbersOf = (packed) => Object.fromEntries(Object.entries(packed).map(([name, text]) =>
  [name, new (KINDS[name] ?? Float32Array)(Shell.bytesOf(text).buffer)]));
const BIT_COUNTS = Uint8Array.from({ length: 256 }, (_, byte) => byte.toString(2).replaceAll('0', '').length);
const CONTROLS = { '\n': '⏎', '\r': '␍', '\t': '⇥' };
/* Marks that have no width, or turn the direction of what follows. */
const UNSEEN = /[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]/g;

/* Text on one line, with signs for what has none of its own; a mark that would join what is before gets a carrier. */
function visible(text) {
  const shown = text.replace(/[\u0000-\u001f\u007f]/g,
    (control) => CONTROLS[control] ?? String.fromCharCode(0x2400 + Math.min(control.charCodeAt(0), 0x21)))
    .replace(UNSEEN, (mark) => `‹U+${mark.charCodeAt(0).toString(16).toUpperCase().padStart(4, '0')}›`);
  return /^\p{M}/u.test(shown) ? `◌${shown}` : shown;
}

const sumOf = (parts) => Object.values(parts).reduce((sum, value) => sum + value, 0);
const meanOf = (values) => sumOf(values) / values.length;
const upTo = (length) => Array.from({ length }, (_, index) => index);

/* Where a value stands among sorted ones: the share that is below it, of equal ones half. */
function rankOf(sorted, value) {
  const below = (includes) => {
    let [low, high] = [0, sorted.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < value || (includes && sorted[middle] === value)) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  return (below(false) + below(true)) / 2 / sorted.length;
}

/* Spearman's rank correlation; not a number where one side is constant. */
function spearman(first, second) {
  const [a, b] = [first, second].map((values) => {
    const sorted = Float64Array.from(values).sort();
    return Array.from(values, (value) => rankOf(sorted, value) - 0.5);
  });
  const product = (one, other) => one.reduce((sum, value, index) => sum + value * other[index], 0);
  return product(a, b) / Math.sqrt(product(a, a) * product(b, b));
}

class TokenList {
  constructor({ ids, tokens, entries, special }) {
    Object.assign(this, { ids, texts: tokens, entries, special: new Set(special) });
    this.occurrences = new Map();
    for (const id of ids) this.occurrences.set(id, (this.occurrences.get(id) ?? 0) + 1);
  }

  get length() {
    return this.ids.length;
  }

  /* The token's stretch of the text; of special tokens and parts of characters the vocabulary entry in brackets. */
  label(index) {
    return this.texts[index] ? visible(this.texts[index]) : `‹${visible(this.entries[index])}›`;
  }

  /* The token, marked, between those around it. */
  context(index, reach = 6) {
    const join = (from, to) => this.texts.slice(Math.max(from, 0), to).map(visible).join('');
    return [join(index - reach, index), Shell.element('mark', {}, this.label(index)),
      join(index + 1, index + 1 + reach)];
  }
}

class Routing {
  constructor(run, known) {
    Object.assign(this, run, { known });
    this.list = new TokenList(run);
    this.bits = Shell.bytesOf(run.active);
    this.stride = Math.ceil(run.experts / 8);
    this.counts = new Uint16Array(run.layers * this.length);
    this.bits.forEach((byte, index) => { this.counts[Math.floor(index / this.stride)] += BIT_COUNTS[byte]; });
    this.all = run.layers * run.experts;
    const layers = upTo(run.layers);
    this.totals = upTo(this.length).map((token) => layers.reduce((sum, layer) => sum + this.count(layer, token), 0));
    this.steps = numbersOf({ counts: run.what_if.counts }).counts;
    const { words, ...packed } = run.next ?? {};
    Object.assign(this, { words }, numbersOf(packed));
  }

  get length() {
    return this.list.length;
  }

  isOn(layer, token, expert) {
    return (this.bits[(layer * this.length + token) * this.stride + (expert >> 3)] >> (7 - (expert & 7))) & 1;
  }

  /* How many experts of a layer a token switches on. */
  count(layer, token) {
    return this.counts[layer * this.length + token];
  }

  /* The share of the neurons that each token uses; at a threshold of the what-if slider what it would use. */
  shares(step = null) {
    if (step === null || step === this.what_if.own) return this.totals.map((total) => total / this.all);
    const start = Math.min(step, this.what_if.thresholds.length - 1) * this.length;
    return Array.from(this.steps.subarray(start, start + this.length), (total) => total / this.all);
  }

  /* Work per token over that of the dense model, if a share of the neurons is used. */
  work(kind, share) {
    const [now, dense] = [this.cost[kind], this.cost[`dense_${kind}`]];
    return (now.attention + dense.ffn * share + now.routers) / sumOf(dense);
  }

  /* The likeliest next tokens after a token, each with its probability. */
  expected(token) {
    const count = this.likeliest.length / this.length;
    return upTo(count).map((rank) => token * count + rank)
      .map((place) => [visible(this.words[this.likeliest[place]]), this.probabilities[place]]);
  }

  /* Of a token the experts that are on though few tokens switch them on, and off though most do, rarest first. */
  unusual(token) {
    const all = upTo(this.layers).flatMap((layer) => upTo(this.experts).map((expert) =>
      ({ layer, expert, use: this.known.useOf(layer, expert), kind: this.kind(layer, token, expert) })));
    return { on: all.filter(({ kind }) => kind === 2).sort((a, b) => a.use - b.use),
      off: all.filter(({ kind }) => kind === 3).sort((a, b) => b.use - a.use) };
  }

  /* 0 off, 1 on, 2 on though at most a quarter of the reference's tokens use it, 3 off though three quarters do. */
  kind(layer, token, expert) {
    const use = this.known.useOf(layer, expert);
    return this.isOn(layer, token, expert) ? (use <= 0.25 ? 2 : 1) : (use >= 0.75 ? 3 : 0);
  }
}

/* What the reference text tells about each expert, and about what is usual. */
class Reference {
  constructor({ text, notes, tokens, strongest: kept, ...packed }, experts) {
    Object.assign(this, { text, notes, kept, experts, list: new TokenList(tokens) }, numbersOf(packed));
    this.mean = meanOf(this.shares);
  }

  useOf(layer, expert) {
    return this.use[layer * this.experts + expert];
  }

  selectivityOf(layer, expert) {
    return this.selectivity[layer * this.experts + expert];
  }

  /* Whether an expert is on for no token or for every one, in words. */
  mark(layer, expert) {
    return { 0: 'dead', 1: 'always on' }[this.useOf(layer, expert)] ?? '';
  }

  strongest(layer, expert) {
    const start = (layer * this.experts + expert) * this.kept;
    return upTo(this.kept).map((rank) => start + rank).filter((place) => this.positions[place] >= 0).map((place) => {
      const position = this.positions[place];
      return { position, score: this.scores[place], switchedOn: this.switched_on[place],
        occurrences: this.list.occurrences.get(this.list.ids[position]) };
    });
  }
}

/* What takes longer than a frame waits until no key was pressed for so long. */
const PAUSE_MS = 80;

/* What a reader has chosen, one choice for the whole page, kept in the address. A token belongs to a run; `at` finds it
   or its counterpart in another. */
class State extends EventTarget {
  constructor(routings, pairs) {
    super();
    this.routings = routings;
    this.unsaved = {};
    this.partners = routings.map((routing) => new Array(routing.length).fill(-1));
    for (const [a, b, size] of pairs) {
      for (let index = 0; index < size; index++) {
        this.partners[0][a + index] = b + index;
        this.partners[1][b + index] = a + index;
      }
    }
    this.read();
  }

  /* From the address, where it says something that is there; else the token that used most, and its rarest expert. */
  read() {
    const whole = (name, length, otherwise) => {
      const found = Number.parseInt(Shell.state.get(name), 10);
      return found >= 0 && found < length ? found : otherwise;
    };
    const run = whole('run', this.routings.length, 0);
    const { totals, length, layers, experts, what_if: { thresholds } } = this.routings[run];
    const most = totals.indexOf(totals.reduce((best, total) => Math.max(best, total), 0));
    const token = whole('token', length, most);
    const [first] = this.routings[run].unusual(token).on;
    const compared = this.partners[0].some((partner) => partner >= 0);
    Object.assign(this, { run, token, layer: whole('layer', layers, first?.layer ?? 0),
      expert: whole('expert', experts, first?.expert ?? 0), step: whole('step', thresholds.length, null),
      colour: Shell.state.get('colour', compared ? 'difference' : 'share'), find: Shell.state.get('find', '') });
  }

  get routing() {
    return this.routings[this.run];
  }

  at(run) {
    const found = run === this.run ? this.token : this.partners[this.run][this.token];
    return found < 0 ? null : found;
  }

  set(changes) {
    const changed = Object.keys(changes).filter((name) => this[name] !== changes[name]);
    if (!changed.length) return;
    Object.assign(this, changes);
    /* Another model may have fewer of both. */
    for (const [name, length] of [['layer', this.routing.layers], ['expert', this.routing.experts]]) {
      if (this[name] >= length) this[name] = 0;
    }
    /* A browser takes a few changes of the address in a second, and a held key makes more. */
    Object.assign(this.unsaved, Object.fromEntries(changed.map((name) => [name, this[name]])));
    clearTimeout(this.timer);
    this.timer = setTimeout(() => Shell.state.set(this.unsaved), PAUSE_MS);
    this.dispatchEvent(new CustomEvent('change', { detail: changed }));
  }

  onChange(names, listener) {
    this.addEventListener('change', (event) => {
      if (event.detail.some((name) => names.includes(name))) listener(event.detail);
    });
  }
}
