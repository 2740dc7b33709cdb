'use strict';
/* The panel that says where the runs of a point come from. */

const FACTS = [['command', 'Command'], ['source', 'File'], ['hardware', 'Hardware'], ['git_commit', 'Commit'],
  ['versions', 'Versions'], ['tokens_trained', 'Tokens trained'], ['wall_time_s', 'Wall time'],
  ['method_config', 'Method'], ['config', 'Config']];

class DetailsPanel {
  constructor(metric) {
    this.metric = metric;
    const { element } = Shell;
    this.title = element('h3', { tabindex: '-1' });
    const close = element('button', { type: 'button' }, 'Close');
    close.addEventListener('click', () => this.close());
    this.runs = element('div', {});
    this.box = element('section', { class: 'panel', 'aria-label': 'Details of the chosen point', hidden: true },
      element('div', { class: 'details-head' }, this.title, close), this.runs);
    this.box.addEventListener('keydown', (event) => {
      if (event.key === 'Escape') this.close();
    });
    this.opener = null;
  }

  show(name, runs, opener) {
    this.opener = opener ?? null;
    this.title.textContent = name;
    this.runs.replaceChildren(...runs.map((run, place) => this.runElement(run, place, runs.length)));
    this.box.hidden = false;
    this.title.focus({ preventScroll: true });
    this.box.scrollIntoView({ block: 'nearest' });
  }

  close() {
    this.box.hidden = true;
    this.opener?.focus();
  }

  runElement(run, place, count) {
    const { element } = Shell;
    const { name: metric, decimals } = this.metric;
    const value = Draw.isNumber(run.value) ? `${metric} ${run.value.toFixed(decimals)}` : run.why ?? 'no value';
    const facts = FACTS.flatMap(([key, name]) => [element('dt', {}, name),
      element('dd', {}, this.fact(key, run[key]))]);
    return element('details', { open: place === 0 || count < 4 }, element('summary', {}, `Seed ${run.seed}: ${value}`),
      element('dl', { class: 'run-facts' }, ...facts));
  }

  fact(key, value) {
    const { element } = Shell;
    if (value === null || value === undefined) return element('span', { class: 'quiet' }, 'not in the record');
    if (key === 'command') return element('pre', {}, element('code', {}, value));
    if (key === 'wall_time_s') return `${Draw.short(value)} s`;
    if (key === 'tokens_trained') return Shell.count(value);
    if (key === 'versions' && typeof value === 'object') {
      return Object.entries(value).map(([name, version]) => `${name} ${version}`).join(', ');
    }
    return typeof value === 'object' ? element('pre', { tabindex: '0' }, JSON.stringify(value, null, 1))
      : String(value);
  }
}
