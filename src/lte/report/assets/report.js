'use strict';
/* The page: a task at a time with its sections, then the timings. */
(() => {
  const { element, data } = Shell;
  const switches = new Switches('Methods: colour and symbol, switch off and on');

  function section(id, title, ...content) {
    return element('section', { 'aria-labelledby': id }, element('h2', { id }, title), ...content);
  }

  /* What would fill a section, folded away. */
  function absent(text) {
    return element('details', {}, element('summary', {}, 'Nothing to show yet: what would fill this'),
      element('p', { class: 'caption' }, text));
  }

  const boxOr = (part, need) => (part.isEmpty ? absent(need) : part.box);

  const SECTIONS = [['tradeoff', 'Trade-off curves'], ['tables', 'Tables'], ['layers', 'Layers'],
    ['routers', 'Routers'],
    ['eta', 'eta against sparsity'], ['latency', 'Latency'], ['batch', 'Batch']];
  const title = Object.fromEntries(SECTIONS);
  let parts = [];

  function showComparison(comparison) {
    parts.forEach((part) => part.remove());
    const tradeoff = comparison.points.length ? new Tradeoff(comparison, switches) : null;
    const [curves, history, routers, eta] = [new LayerCurves(comparison), new LayerHistory(comparison),
      new Routers(comparison), new EtaPlot(comparison, switches)];
    parts = [tradeoff, curves, history, routers, eta].filter(Boolean);
    document.getElementById('shown').replaceChildren(
      section('short', 'In short', ...comparison.sentences.map((text) => element('p', { class: 'lead' }, text)),
        element('p', { class: 'caption' },
          'A model is on the upper envelope where no other method that reads as few bytes is clearly better.')),
      section('tradeoff', title.tradeoff, tradeoff?.box ?? absent(NEEDS.values)),
      section('tables', title.tables, ...tables(comparison)),
      section('layers', title.layers, boxOr(curves, NEEDS.layers), boxOr(history, NEEDS.history)),
      section('routers', title.routers, boxOr(routers, NEEDS.routers)),
      section('eta', title.eta, boxOr(eta, NEEDS.eta)),
    );
  }

  const NEEDS = {
    records: 'Result records, the JSON files that lte eval --json and the experiments write, fill it.',
    values: 'All runs of this task failed: result records with a finite value fill it.',
    layers: 'Result records with measurement.active_fraction, which lte eval --json writes for models with routers, ' +
      'fill it.',
    history: 'Result records with layer_history, the active fraction of each layer at steps of the training, show ' +
      'it over the training too.',
    routers: 'Result records with measurement.score_histogram or measurement.expert_use, which lte eval --json ' +
      'writes for models with routers, fill it.',
    eta: 'Result records with a fixed config.train.eta, an eta of their own, or a log of one, fill it; these have ' +
      'none.',
    latency: 'Files that lte bench --output writes, with timings of one FFN or of a decoding step, fill it.',
    batch: 'Files that lte bench --output writes for several batches (break_even) or for a model folder with texts ' +
      '(union) fill it.',
  };

  function tables(comparison) {
    const details = new DetailsPanel(comparison.metric);
    const isFailed = (table) => table.title === 'Failed runs';
    const made = comparison.tables.map((table) => {
      const choose = (place, opener) => details.show(comparison.failed[place].name, [comparison.failed[place]], opener);
      return element('div', { class: 'panel' }, element('h3', {}, table.title),
        new SortableTable({ ...table, isTitled: true, onChoose: isFailed(table) ? choose : null }).box,
        ...(isFailed(table) ? [details.box] : []));
    });
    const source = comparison.tables.some((table) => table.title.startsWith('The paper'))
      ? [element('p', { class: 'quiet' }, `The paper: ${data.paper}.`)] : [];
    return made.length ? [...made, ...source] : [absent(NEEDS.records)];
  }

  function start() {
    const { comparisons, benches } = data;
    const choice = choiceOf('Task and model', comparisons.map((comparison) => [comparison.title, comparison]),
      showComparison);
    document.getElementById('contents').append(element('ul', {}, ...SECTIONS.map(([id, name]) =>
      element('li', {}, element('a', { href: `#${id}` }, name)))));
    const box = document.getElementById('comparison');
    if (comparisons.length) {
      const name = comparisons.length > 1 ? [element('div', { class: 'controls' }, choice.box)]
        : [element('p', { class: 'lead' }, element('strong', {}, comparisons[0].title))];
      box.append(...name, element('div', { id: 'shown' }));
      showComparison(comparisons[0]);
    } else {
      box.append(...SECTIONS.slice(0, 5).map(([id, name]) => section(id, name, absent(NEEDS[id] ?? NEEDS.records))));
    }
    const [latency, batch] = [new LatencyPlot(benches), new BatchPlots(benches)];
    document.getElementById('benches').append(section('latency', title.latency, boxOr(latency, NEEDS.latency)),
      section('batch', title.batch, boxOr(batch, NEEDS.batch)));
    about(comparisons, benches);
  }

  function about(comparisons, benches) {
    const runs = comparisons.flatMap(({ points, failed }) => [...points.flatMap((point) => point.runs), ...failed]);
    const files = [...new Set([...runs, ...benches].map(({ source }) => source))];
    const count = `${Shell.count(files.length)} result ${files.length === 1 ? 'file' : 'files'}`;
    document.getElementById('about').append(element('p', {},
      `Made by lte ${data.version} from ${count}. Means over seeds, ± one standard deviation of a sample; ` +
      '“-” is a number that the files do not have. FLOPs and bytes are of the block linears per token at batch ' +
        'size 1, routers included. Charts: Apache ECharts, Apache-2.0.'),
    ...(files.length ? [element('details', {}, element('summary', {}, 'Files'),
      element('ul', {}, ...files.map((file) => element('li', {}, file))))] : []));
  }

  start();
})();
