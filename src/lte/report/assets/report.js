'use strict';
/* The page: all tasks and methods at a glance, one task, and what was timed. */
(() => {
  const { element, data, state } = Shell;
  const { overview, comparisons } = data;
  const box = (id) => document.getElementById(id);
  let task = null;
  let shareList = null;
  let asked = null;

  /* The points of a cell and of the best other one, or of LTE's. */
  function pinsOf(row, method, place) {
    const cell = (name) => row?.cells[name]?.[place];
    const others = Object.keys(row?.cells ?? {}).filter((name) => name !== 'lte' && cell(name))
      .sort((a, b) => cell(a).lost - cell(b).lost);
    return [cell('lte'), cell(method === 'lte' ? others[0] : method)].filter(Boolean).map(({ point }) => point);
  }

  /* A cell in the colour of its loss: the further from the goal, the stronger. */
  function paint(cell, { lost, met }, goal) {
    const goals = lost / (goal || 1);
    const strength = met ? 12 + 30 * Math.min(1 - goals, 1) : 10 + 12 * Math.min(goals - 1, 3);
    cell.style.background = `color-mix(in srgb, var(--${met ? 'good' : 'bad'}) ${Math.round(strength)}%, var(--paper))`;
  }

  /* Three figures, three decimals at most. */
  const lossText = (lost) => String(Number(lost.toPrecision(Math.abs(lost) < 0.1 ? 2 : 3))
    .toFixed(Math.abs(lost) < 1 ? 3 : Math.abs(lost) < 10 ? 2 : 0)).replace('-', '−');

  function cellOf(row, method, place) {
    const cell = row.cells[method]?.[place];
    if (cell === undefined) return '';
    if (cell === null) return element('span', { class: 'none', title: 'not measured with that few bytes' }, '–');
    const { lost, sd, seeds, met } = cell;
    const spread = sd === null ? '' : ` ± ${Charts.short(sd)}`;
    const words = `${row.name}, ${methodName(method)}: loses ${Charts.short(lost)}${spread} ${row.metric}, ` +
      `goal of ${row.goal} ${met ? 'met' : 'missed'}, ${seeds} ${seeds === 1 ? 'seed' : 'seeds'}`;
    const best = Object.values(row.cells).every((each) => !each[place] || each[place].lost >= lost);
    const changes = { task: row.name, pins: pinsOf(row, method, place).join() };
    const link = element('a', { href: state.href(changes), title: words, class: best && 'best' },
      `${met ? '✓' : '✗'} ${lossText(lost)}`, element('small', {}, ` ×${seeds}`));
    /* What was chosen since stays. */
    link.addEventListener('click', () => { link.href = state.href(changes); });
    paint(link, cell, row.goal);
    return link;
  }

  function heatMap(place) {
    const rowsShown = overview.rows.filter((row) => Object.values(row.cells).some((cells) => cells[place]));
    const count = (method) => rowsShown.filter((row) => row.cells[method]?.[place]).length;
    const methods = overview.methods.filter(count).sort((a, b) => (b === 'lte') - (a === 'lte') || count(b) - count(a));
    const none = overview.methods.filter((method) => !count(method));
    const name = (row) => element('span', { class: 'clamped', title: `${row.name}, goal ${row.goal} ${row.metric}` },
      ...Shell.breakable(row.name));
    const table = Shell.table('Quality lost by task and method',
      ['task', ...methods.map((method) => [Shell.dot(data.colours[method]), methodName(method)])],
      rowsShown.map((row) => [name(row), ...methods.map((method) => cellOf(row, method, place))]));
    table.className = 'heat';
    table.caption.className = 'unseen';
    Shell.rove(table, 'a');
    const goals = [...new Set(overview.rows.map(({ goal, metric }) => `${goal} ${metric}`))];
    const rest = none.map((method) => Charts.clip(methodName(method), 30));
    return [table, element('p', { class: 'quiet' }, `The goal is to lose at most ${goals.join(', ')}.`,
      rest.length ? ` Not measured with that few bytes: ${rest.join(', ')}.` : '')];
  }

  function showOverview() {
    const section = box('overview');
    section.append(element('h2', { id: 'glance', class: 'unseen' }, 'At a glance'),
      element('p', { class: 'answer' }, overview.sentence));
    if (!overview.rows.length) return;
    const map = element('div', { class: 'sideways', tabindex: '-1' });
    const draw = (place) => map.replaceChildren(...heatMap(place));
    const share = Shell.choice('Quality lost where at most', overview.shares.map((each, place) => [Charts.share(each),
      place]), draw,
      { name: 'share', chosen: overview.shares.indexOf(overview.share) });
    share.box.append(' of the dense model’s bytes are read');
    draw(share.value);
    shareList = share;
    section.append(element('div', { class: 'controls' }, share.box, element('span', { class: 'quiet' },
      '✓ within the goal, ✗ not; ×3: three seeds; framed: the least of its row; –: not measured with that few. ' +
      'A cell leads to its task.')), map);
  }

  const columns = (boxes) => (boxes.length ? [element('div', { class: 'columns two' }, ...boxes)] : []);

  function folded(title, ...content) {
    return content.length ? [element('details', { class: 'folded' }, element('summary', {}, title), ...content)] : [];
  }

  async function showTask(name, focus = false) {
    const found = comparisons.find((each) => each.name === name) ?? first();
    asked = name;
    const comparison = await Shell.unpack(found.packed);
    if (asked !== name) return;
    task = new Task(comparison, pinsOf(overview.rows.find((row) => row.name === found.name), 'lte',
      Number(shareList?.select.selectedIndex)));
    const list = Shell.choice('Task', comparisons.map((each) => [each.name, each.name]), (chosen) => {
      state.set({ task: chosen, pins: null });
      showTask(chosen);
    }, { chosen: comparisons.indexOf(found) });
    const heading = element('h2', { id: 'task-name', tabindex: '-1' }, found.name);
    const tables = comparison.tables.map((table) => new SortableTable({ ...table, best: comparison.metric }));
    const failed = comparison.failed.map((run) => element('p', {},
      element('strong', {}, `${run.name}, seed ${run.seed}: ${run.why}`), ' ', run.command ?? run.source));
    box('task').replaceChildren(element('div', { class: 'task-head' }, heading, list.box),
      element('p', { class: 'quiet' }, comparison.title), task.box,
      ...folded('Ablations and variants', ...task.variants()),
      ...folded('Inside the models: layers, routers, training', ...columns(layerPanels(comparison))),
      ...folded(`All results as a table: ${comparison.points.length}`, ...(task.table ? [task.table.box] : [])),
      ...folded(`In words and in tables: goal, upper envelope, the paper${failed.length ? ', failed runs' : ''}`,
        ...comparison.sentences.map((text) => element('p', { class: 'lead' }, text)),
          ...tables.map((table) => table.box), ...failed));
    Shell.clearPictures();
    document.body.dataset.shown = found.name;
    if (focus) {
      heading.focus({ preventScroll: true });
      box('task').scrollIntoView();
    }
  }

  /* Without a choice: the first of the overview. */
  const first = () => comparisons[overview.rows[0]?.comparison ?? 0];

  async function showSpeed() {
    const benches = data.benches ? await Shell.unpack(data.benches) : [];
    const panels = speedPanels(benches);
    box('speed').hidden = !panels.length;
    if (panels.length) {
      box('speed').append(element('h2', { id: 'speed-name' }, 'Measured speed'), element('p', { class: 'quiet' },
        'What lte bench timed, by machine and model; not of one task.'), panels[0], ...columns(panels.slice(1)));
    }
  }

  function showAbout() {
    const { files, version } = data;
    const count = `${Shell.count(files.length)} result ${files.length === 1 ? 'file' : 'files'}`;
    box('about').append(element('p', {}, 'A sparse model computes only those neurons of its feed-forward layers that ' +
      `a token needs. Made by lte ${version} from ${count}. Means over seeds, ± one standard deviation of a sample; ` +
      '“-” is a number that the files do not have. FLOPs and bytes are of the block linears per token at batch ' +
      `size 1, routers included, as shares of the dense model’s; 1 G is 2^30. The paper: ${data.paper}. ` +
      'Charts: Apache ECharts, Apache-2.0.'),
    ...(files.length ? folded('Files', element('ul', {}, ...files.map((file) => element('li', {}, file)))) : []));
  }

  async function start() {
    document.body.dataset.busy = 'yes';
    showOverview();
    showAbout();
    box('task').hidden = !comparisons.length;
    if (comparisons.length) {
      await showTask(state.get('task'));
      if (!task.chart) box('task').querySelectorAll('.folded').forEach((each) => { each.open = true; });
      state.onChange(() => showTask(state.get('task'), true));
    }
    await showSpeed();
    delete document.body.dataset.busy;
    document.body.dataset.ready = 'yes';
  }

  start();
})();
