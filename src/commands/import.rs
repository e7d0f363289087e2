//! `import`: what runs today, as the two files; and what its routing left in the kernel.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::UsageError;
use super::output::results;
use crate::cli::{Global, ImportArgs, ImportSource};
use crate::config;
use crate::import::{self, Entry, Files, Found, Hints, Meaning};
use crate::pathway::leftovers::{self, Known};

/// Where units are, the administrator's first.
const UNITS: [&str; 3] = [
    "/etc/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

/// Runs the verb.
pub(super) fn run(global: &Global, args: &ImportArgs) -> anyhow::Result<ExitCode> {
    let mut found = Found::default();
    let mut scripts = None;
    match &args.source {
        ImportSource::GoMmproxy { words } => found = command_line(words)?,
        ImportSource::MmproxyJson { files } => add_json(&mut found, files)?,
        ImportSource::Units { paths } => found = units(paths)?,
        ImportSource::Compose { files } => {
            for file in files {
                let more = import::compose(file, &text(file)?).map_err(UsageError)?;
                extend(&mut found, more);
            }
        }
        ImportSource::Scripts { dir } => scripts = Some(dir.join("config")),
    }
    let named = std::mem::take(&mut found.json_files);
    add_json(&mut found, &named)?;
    let mut known = known(&found);
    let files = match &scripts {
        Some(dir) => from_scripts(dir, &mut known)?,
        None if found.entries.is_empty() => {
            return Err(
                UsageError("nothing there that starts go-mmproxy or mmproxy".to_owned()).into(),
            );
        }
        None => import::write(&found.entries, &found.hints),
    };
    if args.write {
        write(&global.config_dir, &files)?;
    } else {
        let mut out = results();
        write!(
            out,
            "# ---- pathways.conf\n{}\n# ---- instances.tsv\n{}",
            files.pathways, files.instances
        )?;
    }
    leftovers(args.clean, &known)
}

fn command_line(words: &[String]) -> anyhow::Result<Found> {
    let mut whole = vec!["go-mmproxy".to_owned()];
    whole.extend_from_slice(words);
    // the program's name may be among the words, as pasted
    let whole = match words
        .first()
        .map(|word| crate::compat::OldName::of(word.as_ref()))
    {
        Some(Some(_)) => words.to_vec(),
        _ => whole,
    };
    let directory = std::env::current_dir().context("there is no current directory")?;
    let Some(outcome) = import::command_line(&whole, None, Some(&directory)) else {
        return Err(UsageError("no flags of go-mmproxy".to_owned()).into());
    };
    let (meaning, mut found) = outcome.map_err(UsageError)?;
    found.entries.push(Entry {
        source: "command line".to_owned(),
        line: None,
        text: whole.join(" "),
        meaning,
    });
    Ok(found)
}

fn units(paths: &[PathBuf]) -> anyhow::Result<Found> {
    let usual: Vec<PathBuf> = UNITS.iter().map(PathBuf::from).collect();
    let named = !paths.is_empty();
    let mut files = BTreeSet::new();
    for path in if named { paths } else { &usual } {
        if !path.is_dir() {
            if named {
                files.insert(path.clone());
            }
            continue;
        }
        let entries =
            fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))?;
        for entry in entries {
            let file = entry
                .with_context(|| format!("cannot read {}", path.display()))?
                .path();
            if file.extension().is_some_and(|suffix| suffix == "service") {
                files.insert(file);
            }
        }
    }
    let mut found = Found::default();
    let mut seen = BTreeSet::new();
    for file in files {
        // /lib is a link to /usr/lib, and units have aliases
        let real = file.canonicalize().unwrap_or_else(|_| file.clone());
        if !seen.insert(real) {
            continue;
        }
        let text = match fs::read(&file) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            // a unit that is masked or whose link leads nowhere, among many
            Err(_) if !named => continue,
            Err(error) => {
                return Err(UsageError(format!("cannot read {}: {error}", file.display())).into());
            }
        };
        if named || text.contains("mmproxy") {
            let more = import::unit(&file, &text, &|path| fs::read_to_string(path).ok());
            extend(&mut found, more);
        }
    }
    Ok(found)
}

fn add_json(found: &mut Found, files: &[PathBuf]) -> anyhow::Result<()> {
    for file in files {
        // with IPv6, whatever this host has: the files may be for another one
        let (form, warnings) = config::read_json(file, true)?;
        if !warnings.is_empty() {
            eprintln!("{}\n", super::drawn(&warnings));
        }
        let more = import::json(file, &text(file)?, &form);
        extend(found, more);
    }
    Ok(())
}

fn text(file: &Path) -> anyhow::Result<String> {
    fs::read(file)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .map_err(|error| UsageError(format!("cannot read {}: {error}", file.display())).into())
}

fn extend(found: &mut Found, more: Found) {
    found.entries.extend(more.entries);
    found.json_files.extend(more.json_files);
    found.hints.extend(&more.hints);
}

/// Marks and tables of the old set-up, as far as it says.
fn known(found: &Found) -> Known {
    let Hints { marks, tables } = &found.hints;
    let mut known = Known {
        marks: marks.iter().copied().collect(),
        tables: tables.iter().copied().collect(),
    };
    for entry in &found.entries {
        if let Meaning::Relays(drafts) = &entry.meaning {
            let marks = drafts.iter().filter_map(|draft| draft.mark);
            known.marks.extend(marks.map(|mark| mark.get()));
        }
    }
    known
}

/// The shell set-up's files are the two files already; each line stays as it is.
fn from_scripts(dir: &Path, known: &mut Known) -> anyhow::Result<Files> {
    let configuration = config::load_pathways(dir)?;
    for pathway in &configuration.pathways {
        known.marks.insert(pathway.mark.get());
        // that set-up uses the mark as the table
        known.tables.insert(pathway.mark.get());
    }
    let read = |name: &str| {
        let file = dir.join(name);
        text(&file).map(|text| {
            let end = if text.ends_with('\n') || text.is_empty() {
                ""
            } else {
                "\n"
            };
            format!(
                "# from {}, every line as it is there\n{text}{end}",
                file.display()
            )
        })
    };
    Ok(Files {
        pathways: read("pathways.conf")?,
        instances: read("instances.tsv")?,
        relays: configuration.instances.len(),
    })
}

/// Writes both files, or neither: what is there stays.
fn write(dir: &Path, files: &Files) -> anyhow::Result<()> {
    let both = [
        (dir.join("pathways.conf"), &files.pathways),
        (dir.join("instances.tsv"), &files.instances),
    ];
    for (path, _) in &both {
        if path.symlink_metadata().is_ok() {
            bail!(
                "{} is there already: nothing was written; without --write both files are printed",
                path.display()
            );
        }
    }
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    for (path, text) in &both {
        let mut file = fs::File::create_new(path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        file.write_all(text.as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))?;
        writeln!(results(), "{}: written", path.display())?;
    }
    let relays = files.relays;
    writeln!(
        results(),
        "{relays} relay{}",
        if relays == 1 { "" } else { "s" }
    )?;
    let allow = dir.join("allow.txt");
    if !allow.exists() {
        writeln!(
            results(),
            "{} is missing: the proxies that are believed, one address a line",
            allow.display()
        )?;
    }
    Ok(())
}

/// Lists what old routing left in the kernel, or removes it.
fn leftovers(clean: bool, known: &Known) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let steps = match runtime.block_on(leftovers::find(known)) {
        Ok(steps) => steps,
        Err(error) if clean => {
            return Err(error).context("cannot look for what is left in the kernel");
        }
        Err(error) => {
            eprintln!("not looked for what is left in the kernel: {error}");
            return Ok(ExitCode::SUCCESS);
        }
    };
    if steps.is_empty() {
        if clean {
            writeln!(results(), "# nothing is left in the kernel")?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let what = if clean {
        "removed"
    } else {
        "left there; --clean removes it"
    };
    writeln!(
        results(),
        "\n# ---- in the kernel, made for the old set-up: {what}"
    )?;
    let failed = match clean {
        true => runtime
            .block_on(leftovers::remove(&steps))
            .err()
            .unwrap_or_default(),
        false => Vec::new(),
    };
    for step in &steps {
        if !failed
            .iter()
            .any(|(other, _)| other.as_ref().is_none_or(|other| other == step))
        {
            writeln!(results(), "# {step}")?;
        }
    }
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let reasons: Vec<String> = failed
        .into_iter()
        .map(|(step, error)| {
            let step = step.map(|step| format!("{step}: ")).unwrap_or_default();
            format!("{step}{:#}", anyhow::Error::from(error))
        })
        .collect();
    bail!("not removed:\n{}", reasons.join("\n"));
}
