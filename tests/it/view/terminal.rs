//! `top` in a real terminal of 80 columns (tmux).

use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use super::{Lab, v1};
use crate::support::net::wait_for;

/// A tmux server of the test's own, gone with the value.
struct Terminal<'l> {
    lab: &'l Lab,
    socket: String,
}

impl<'l> Terminal<'l> {
    fn new(lab: &'l Lab, words: &str) -> Self {
        let socket = lab.host.dir().join("tmux").display().to_string();
        let terminal = Self { lab, socket };
        let run = lab.host.mmproxyctl(words);
        let mut command = terminal.tmux();
        command.args([
            "-f",
            "/dev/null",
            "new-session",
            "-d",
            "-x",
            "80",
            "-y",
            "24",
        ]);
        command.arg(run.get_program()).args(run.get_args());
        let status = command
            .status()
            .expect("tmux: install it (./tests/run.sh does)");
        assert!(status.success());
        terminal
    }

    fn tmux(&self) -> Command {
        let mut command = self.lab.host.command("tmux");
        command.args(["-S", &self.socket]).env_remove("TMUX");
        command
            .env("LC_ALL", "C.UTF-8")
            .env("TERM", "xterm-256color");
        command
    }

    fn screen(&self) -> String {
        let output = self.tmux().args(["capture-pane", "-p"]).output();
        String::from_utf8_lossy(&output.expect("tmux").stdout).into_owned()
    }

    fn press(&self, key: &str) {
        let status = self.tmux().args(["send-keys", key]).status();
        assert!(status.expect("tmux").success());
    }
}

impl Drop for Terminal<'_> {
    fn drop(&mut self) {
        let _ = self.tmux().arg("kill-server").output();
    }
}

#[test]
fn top_fits_eighty_columns_and_follows_the_keys() {
    let lab = Lab::new();
    let _relay = lab.run("");
    let mut open = lab.client(&v1("203.0.113.107", 40_000), "hello");
    let terminal = Terminal::new(&lab, "top --interval 100ms");
    let waiting = |text: &str| {
        let mut screen = String::new();
        let end = Instant::now() + Duration::from_secs(10);
        while !screen.contains(text) {
            assert!(Instant::now() < end, "no '{text}' on\n{screen}");
            screen = terminal.screen();
        }
    };
    waiting("203.0.113.107:40000");
    let screen = terminal.screen();
    for text in [
        "INSTANCE", "web", "spare", "running", "1 active", "CLIENT", "q quit",
    ] {
        assert!(screen.contains(text), "no {text} on\n{screen}");
    }
    // rates appear, and a sparkline
    wait_for("a sparkline", || {
        let _ = open.write_all(&[b'x'; 1000]);
        terminal.screen().contains('█')
    });
    terminal.press("s");
    waiting("by bytes");
    terminal.press("Enter");
    waiting("connections of web");
    terminal.press("Down");
    waiting("connections of spare");
    assert!(!terminal.screen().contains("203.0.113.107"));
    terminal.press("p");
    waiting("paused");
    terminal.press("q");
    wait_for("the end of top", || {
        let sessions = terminal.tmux().arg("list-sessions").output();
        !sessions.expect("tmux").status.success()
    });
}

#[test]
fn top_without_a_terminal_says_so() {
    let lab = Lab::new();
    let output = lab.ctl("top");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("top needs a terminal"));
}
