//! How evenly a relay's threads share the load: few long connections, many long ones, many short ones.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::cell::{Extent, Stand};
use crate::load::Work;
use crate::programs::Program;
use crate::report;
use crate::usage;

/// Threads below this share of the relay's CPU time are counted, not listed.
const NEGLIGIBLE: f64 = 0.02;

/// What is run, and how many connections it has.
const LOADS: &[(&str, Work, usize)] = &[
    ("2 long", Work::Exchange, 2),
    ("4 long", Work::Exchange, 4),
    ("8 long", Work::Exchange, 8),
    ("50 long", Work::Exchange, 50),
    ("50 bulk", Work::Bulk, 50),
    ("short", Work::Connect, 50),
];

/// Prints each thread's share of the relay's CPU time, per load and round: placement is partly luck, so the
/// rounds are shown one by one.
///
/// # Errors
/// When the relay fails under load.
pub(crate) fn run(programs: &[Program], rounds: u32, extent: Extent) -> Result<()> {
    let heading = [
        "program",
        "connections",
        "round",
        "CPU by thread",
        "busiest ÷ even share",
    ];
    let mut lines = vec![heading.map(str::to_owned).to_vec()];
    for &program in programs
        .iter()
        .filter(|&&program| program != Program::Direct)
    {
        for &(name, work, connections) in LOADS {
            for round in 1..=rounds {
                let stand = Stand::new(program, false, extent)?;
                stand.ready()?;
                let outcome = stand.load(work, connections, || {
                    usage::thread_times(&stand.relay_processes()?)
                })?;
                if let Some((kind, count)) = outcome.failures.0.first_key_value() {
                    bail!("{}, {name}: {kind} ({count} times)", program.title());
                }
                let (before, after) = outcome.probes;
                let mut spent: Vec<(String, Duration)> = after
                    .into_iter()
                    .map(|(id, (name, time))| {
                        let earlier = before.get(&id).map_or(Duration::ZERO, |(_, time)| *time);
                        (name, time.saturating_sub(earlier))
                    })
                    .collect();
                spent.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
                let (shares, unevenness) = shares(&spent, extent.relay_threads);
                lines.push(vec![
                    program.title().to_owned(),
                    name.to_owned(),
                    round.to_string(),
                    shares,
                    format!("{unevenness:.2}"),
                ]);
            }
        }
    }
    println!("{}", report::table(lines));
    Ok(())
}

/// The shares as text, and the busiest thread's share against an even one (1 is perfect).
fn shares(spent: &[(String, Duration)], workers: usize) -> (String, f64) {
    let total: f64 = spent.iter().map(|(_, time)| time.as_secs_f64()).sum();
    let share = |time: &Duration| time.as_secs_f64() / total.max(f64::MIN_POSITIVE);
    let mut text: Vec<String> = spent
        .iter()
        .filter(|(_, time)| share(time) >= NEGLIGIBLE)
        .map(|(name, time)| format!("{name} {:.0} %", share(time) * 100.0))
        .collect();
    let rest = spent.len() - text.len();
    if rest > 0 {
        text.push(format!("{rest} more idle"));
    }
    let busiest = spent.first().map_or(0.0, |(_, time)| share(time));
    (text.join(", "), busiest * workers as f64)
}
