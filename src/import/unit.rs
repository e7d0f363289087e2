//! systemd unit files: the commands in them, with their variables and prefixes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{Entry, Found, Hints, Meaning, ReadFile, command_line};

/// Reads a unit; what it names by `EnvironmentFile=` is read through `read`.
pub fn unit(path: &Path, text: &str, read: ReadFile<'_>) -> Found {
    let unit = Unit::new(path, text, read);
    let mut found = Found::default();
    for Setting { key, value, line } in &unit.settings {
        if !key.starts_with("Exec") {
            continue;
        }
        let words = unit.words(value);
        let entry = |meaning| Entry {
            source: path.display().to_string(),
            line: Some(*line),
            text: format!("{key}={value}"),
            meaning,
        };
        if let Some(hints) = Hints::of_command(&words) {
            found.hints.extend(&hints);
            let note = "not needed any more: mmproxyctl pathway does it".to_owned();
            found.entries.push(entry(Meaning::Note(note)));
            continue;
        }
        match command_line(
            &in_shell(words),
            Some(&unit.name),
            unit.directory.as_deref(),
        ) {
            None if key == "ExecStart" && value.contains("mmproxy") => {
                let note = "this starts something of its own: a start script's directory goes to mmproxyctl \
                            import scripts DIR";
                found.entries.push(entry(Meaning::Note(note.to_owned())));
            }
            None => {}
            Some(Err(problem)) => found.entries.push(entry(Meaning::Note(problem))),
            Some(Ok((meaning, more))) => {
                found.json_files.extend(more.json_files);
                found.entries.push(entry(meaning));
            }
        }
    }
    found
}

/// The words of a shell's line where a shell is called with one: `sh -c "exec go-mmproxy -l …"`.
fn in_shell(words: Vec<String>) -> Vec<String> {
    let is_shell = words
        .first()
        .is_some_and(|word| matches!(word.rsplit('/').next(), Some("sh" | "bash" | "dash")));
    match words.iter().position(|word| word == "-c" || word == "-xc") {
        Some(at) if is_shell => words
            .get(at + 1)
            .and_then(|line| shlex::split(line))
            .unwrap_or_default(),
        _ => words,
    }
}

struct Setting {
    key: String,
    value: String,
    line: usize,
}

struct Unit {
    /// Without directory and suffix; what an instance may be called.
    name: String,
    settings: Vec<Setting>,
    variables: BTreeMap<String, String>,
    directory: Option<PathBuf>,
}

impl Unit {
    fn new(path: &Path, text: &str, read: ReadFile<'_>) -> Self {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let prefix = stem.split('@').next().unwrap_or_default().to_owned();
        let settings = settings(text);
        let specified = |value: &str| value.replace("%p", &prefix).replace("%N", &stem);
        let mut variables = BTreeMap::new();
        // files override Environment=, wherever they stand
        for setting in settings.iter().filter(|one| one.key == "Environment") {
            for word in shlex::split(&setting.value).unwrap_or_default() {
                assign(&mut variables, &word);
            }
        }
        for setting in settings.iter().filter(|one| one.key == "EnvironmentFile") {
            let file = specified(setting.value.trim_start_matches('-'));
            for line in read(Path::new(&file)).unwrap_or_default().lines() {
                if !line.trim_start().starts_with(['#', ';']) {
                    assign(&mut variables, line.trim());
                }
            }
        }
        let directory = settings
            .iter()
            .rev()
            .find(|one| one.key == "WorkingDirectory")
            .map(|one| PathBuf::from(specified(one.value.trim_start_matches('-'))));
        Self {
            name: prefix,
            settings,
            variables,
            directory,
        }
    }

    /// A command's words: without systemd's prefixes, variables replaced, `$NAME` alone as several words.
    fn words(&self, value: &str) -> Vec<String> {
        let command = value.trim_start_matches(['@', '-', ':', '+', '!']);
        let mut words = Vec::new();
        for word in shlex::split(command).unwrap_or_default() {
            let whole = word
                .strip_prefix('$')
                .filter(|name| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'));
            match whole {
                Some(name) => {
                    let value = self.variables.get(name).map_or("", String::as_str);
                    words.extend(shlex::split(value).unwrap_or_default());
                }
                None => {
                    let mut word = word;
                    for (name, value) in &self.variables {
                        word = word.replace(&format!("${{{name}}}"), value);
                    }
                    words.push(word);
                }
            }
        }
        words
    }
}

fn assign(variables: &mut BTreeMap<String, String>, word: &str) {
    if let Some((name, value)) = word.split_once('=') {
        variables.insert(name.trim().to_owned(), value.to_owned());
    }
}

/// `KEY=VALUE` lines, those that go on behind `\` put together, with the line they begin on.
fn settings(text: &str) -> Vec<Setting> {
    let mut all = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';', '[']) {
            continue;
        }
        let mut whole = line.to_owned();
        while let Some(head) = whole.strip_suffix('\\') {
            whole = head.trim_end().to_owned();
            match lines.next() {
                // a comment between the pieces belongs to neither
                Some((_, next)) if next.trim_start().starts_with(['#', ';']) => whole.push('\\'),
                Some((_, next)) => {
                    whole.push(' ');
                    whole.push_str(next.trim());
                }
                None => break,
            }
        }
        if let Some((key, value)) = whole.split_once('=') {
            all.push(Setting {
                key: key.trim().to_owned(),
                value: value.trim().to_owned(),
                line: number + 1,
            });
        }
    }
    all
}
