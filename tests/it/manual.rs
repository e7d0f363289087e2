//! What is printed for the shell and the manual: complete, and no panic where it cannot be written.

use std::fs::File;
use std::process::Command;

fn mmproxyctl(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mmproxyctl"));
    command.args(words);
    command
}

#[test]
fn every_page_that_the_manual_refers_to_is_there() {
    let output = mmproxyctl(&["man"]).output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap().replace('\\', "");
    for page in ["mmproxyctl", "mmproxyctl-run", "mmproxyctl-pathway-add"] {
        assert!(text.contains(&format!(".TH {page} 1")), "no {page}");
    }
    let referred = text.lines().filter_map(|line| line.strip_suffix("(1)"));
    let mut count = 0;
    for page in referred.filter(|page| !page.ends_with("help")) {
        assert!(text.contains(&format!(".TH {page} 1")), "no {page}");
        count += 1;
    }
    assert!(count > 10, "{count} pages");
    for option in ["drain-timeout", "dry-run", "corrupt"] {
        assert!(text.contains(option), "nothing about --{option}");
    }
}

#[test]
fn a_full_stdout_is_an_error_and_no_panic() {
    for words in [
        ["completions", "bash"].as_slice(),
        &["completions", "zsh"],
        &["man"],
    ] {
        let output = mmproxyctl(words)
            .stdout(File::options().write(true).open("/dev/full").unwrap())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains("No space left"), "{said}");
    }
}
