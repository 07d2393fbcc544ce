package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/alecthomas/kong"
	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/layers"
)

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "1": 1, "4096": 4096, "64K": 64 << 10, "64k": 64 << 10, "10M": 10 << 20, "20G": 20 << 30, "1T": 1 << 40,
		"2P": 2 << 50, "7E": 7 << 60, "3KiB": 3 << 10, "3kb": 3 << 10, "9223372036854775807": 1<<63 - 1, "12B": 12,
	} {
		if got, err := ParseSize(text); err != nil || got != want {
			t.Errorf("%q: %d %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{
		"", "K", "-1", "+1", "1.5G", "1X", "1KK", "1Ki B", "8E", "9223372036854775808", "16777216T", "0x10", " 1", "1 K", "1i", "1iB", "1KBi", "1BK",
	} {
		if got, err := ParseSize(text); err == nil {
			t.Errorf("%q accepted as %d", text, got)
		}
	}
}

func TestExitCodes(t *testing.T) {
	image := func(class error) error {
		return fmt.Errorf("open: %w", &layers.ImageError{Path: "/x/y.qcow2", Offset: 5, Field: "f", Value: 7, Err: class})
	}
	for _, c := range []struct {
		err  error
		code int
		says []string
	}{
		{image(layers.ErrInUse), ExitInUse, []string{"tool: open: /x/y.qcow2", "fuser"}},
		{image(layers.ErrCorrupt), ExitDamaged, []string{"image-fsck -n /x/y.qcow2"}},
		{image(layers.ErrFormat), ExitFailed, nil},
		{image(layers.ErrPolicy), ExitFailed, []string{"--allow-path"}},
		{unix.ENOSPC, ExitFailed, []string{"tool: no space left on device\n"}},
		{Usagef("bad %d", 1), ExitUsage, []string{"tool: bad 1\n", "tool --help"}},
		{context.Canceled, ExitInterrupt, nil},
		{SignalError{unix.SIGINT}, 130, nil},
		{fmt.Errorf("x: %w", SignalError{unix.SIGTERM}), 143, nil},
		{WithExit(ExitInUse, WithHint(errors.New("what"), "do %s", "this")), ExitInUse, []string{"tool: what\ntool: do this\n"}},
		{errors.Join(errors.New("one"), image(layers.ErrCorrupt)), ExitDamaged, []string{"tool: one\ntool: open"}},
	} {
		if got := ExitCode(c.err); got != c.code {
			t.Errorf("%v: exit %d, want %d", c.err, got, c.code)
		}
		msg := Message("tool", c.err)
		for line := range strings.Lines(msg) {
			if !strings.HasPrefix(line, "tool: ") || !strings.HasSuffix(line, "\n") {
				t.Errorf("%v: line %q", c.err, line)
			}
		}
		for _, want := range c.says {
			if !strings.Contains(msg, want) {
				t.Errorf("message %q does not say %q", msg, want)
			}
		}
	}
	if !errors.Is(SignalError{unix.SIGINT}, context.Canceled) {
		t.Error("a signal is a cancellation")
	}
}

type testFlags struct {
	Common
	ImageFlags
	Image string `arg:""`
}

func execute(t *testing.T, run func(context.Context, *testFlags) error, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var f testFlags
	var out, errOut strings.Builder
	tool := Tool{Name: "tool", Description: "Test.", Flags: &f,
		Run: func(ctx context.Context, _ *kong.Context) error { return run(ctx, &f) }}
	code = tool.Execute(t.Context(), args, &out, &errOut)
	return code, out.String(), errOut.String()
}

func TestExecute(t *testing.T) {
	ok := func(context.Context, *testFlags) error { return nil }
	var seen testFlags
	code, _, stderr := execute(t, func(_ context.Context, f *testFlags) error { seen = *f; return nil },
		"--cache-size=2M", "--allow-path", "/a,b", "--allow-path=/c", "--format", "raw", "img")
	if code != 0 || seen.CacheSize != 2<<20 || fmt.Sprint(seen.AllowPath) != "[/a,b /c]" || seen.Format != "raw" || seen.Image != "img" {
		t.Errorf("flags: %d %q %+v", code, stderr, seen)
	}
	for _, args := range [][]string{{}, {"--no-such", "img"}, {"--cache-size=x", "img"}, {"a", "b"}} {
		if code, stdout, stderr := execute(t, ok, args...); code != ExitUsage || stdout != "" || !strings.HasPrefix(stderr, "tool: ") {
			t.Errorf("%q: exit %d, stdout %q, stderr %q", args, code, stdout, stderr)
		}
	}
	if code, stdout, _ := execute(t, ok, "--version"); code != 0 || stdout != "tool "+Version+"\n" {
		t.Errorf("--version: %d %q", code, stdout)
	}
	if code, stdout, _ := execute(t, ok, "--help"); code != 0 || !strings.Contains(stdout, "--cache-size") {
		t.Errorf("--help: %d %q", code, stdout)
	}
	fail := func(context.Context, *testFlags) error { return unix.EDQUOT }
	if code, stdout, stderr := execute(t, fail, "img"); code != ExitFailed || stdout != "" || stderr != "tool: disk quota exceeded\n" {
		t.Errorf("failure: %d %q %q", code, stdout, stderr)
	}
	silent := func(context.Context, *testFlags) error { return Exit(7) }
	if code, _, stderr := execute(t, silent, "img"); code != 7 || stderr != "" {
		t.Errorf("silent exit: %d %q", code, stderr)
	}
}

func TestPrintJSON(t *testing.T) {
	var b strings.Builder
	if err := PrintJSON(&b, map[string]any{"a": "<&>"}); err != nil || b.String() != "{\n  \"a\": \"<&>\"\n}\n" {
		t.Errorf("%q %v", b.String(), err)
	}
}

// A name in an image may be as long as it likes.
func TestLongMessage(t *testing.T) {
	m := Message("tool", fmt.Errorf("%s: the reason", strings.Repeat("ä", 100_000)))
	if len(m) > maxLine+20 || !strings.HasPrefix(m, "tool: ä") || !strings.HasSuffix(m, ": the reason\n") || !utf8.ValidString(m) {
		t.Errorf("%d bytes: %.50s", len(m), m)
	}
}
