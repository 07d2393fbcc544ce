package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	// A keeper must never run the tests: they would start keepers.
	if Be("test-keeper", func(setup json.RawMessage) (Service, error) {
		s := &echo{}
		return s, json.Unmarshal(setup, &s.dir)
	}) {
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// echo is a service for the tests. It leaves a file in dir when it ends.
type echo struct{ dir string }

func (e *echo) End() { _ = os.WriteFile(filepath.Join(e.dir, "ended"), nil, 0o600) }

func (e *echo) Serve(ctx context.Context, request json.RawMessage, given Given) Reply {
	var q string
	if err := json.Unmarshal(request, &q); err != nil {
		return Reply{FD: -1, Err: err}
	}
	switch q {
	case "wait":
		select {
		case <-ctx.Done():
			return Reply{FD: -1, Err: errors.New("given up")}
		case <-time.After(time.Minute):
			return Reply{FD: -1, Err: errors.New("not given up")}
		}
	case "swap": // takes a file, reads a byte of it, gives another
		b := make([]byte, 1)
		if _, err := unix.Pread(given.FD, b, 0); err != nil {
			return Reply{FD: -1, Err: err}
		}
		fd, err := unix.Open(filepath.Join(e.dir, "other"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return Reply{Answer: string(b), FD: fd, Err: err}
	case "big":
		return Reply{Answer: strings.Repeat("x", maxMessage), FD: -1}
	case "large":
		return Reply{Answer: strings.Repeat("x", maxMessage-1000), FD: -1}
	case "fail":
		return Reply{FD: -1, Err: errors.New("it failed")}
	case "descriptors":
		names, err := os.ReadDir("/proc/self/fd")
		return Reply{Answer: fmt.Sprint(len(names)), FD: -1, Err: err}
	}
	return Reply{Answer: q + q, FD: -1}
}

func TestKeeper(t *testing.T) {
	dir := t.TempDir()
	k, err := Start(dir, Options{Title: "test"})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	ctx := t.Context()
	for range 3 {
		var got string
		if err := k.Ask(ctx, "ab", &got); err != nil || got != "abab" {
			t.Errorf("%q %v", got, err)
		}
	}
	if err := k.Ask(ctx, "fail", nil); err == nil || err.Error() != "it failed" {
		t.Error(err)
	}
	if err := k.Ask(ctx, "big", nil); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Error(err)
	}
	var large string
	if err := k.Ask(ctx, "large", &large); err != nil || len(large) != maxMessage-1000 {
		t.Error(len(large), err)
	}
	if err := k.Ask(ctx, strings.Repeat("x", maxMessage), nil); !errors.Is(err, unix.EMSGSIZE) {
		t.Error(err)
	}
	// Files in both directions, and none left open.
	for name, content := range map[string]string{"mine": "m", "other": "o"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(filepath.Join(dir, "mine"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var before, after, got string
	if err := k.Ask(ctx, "descriptors", &before); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		fd, err := k.AskFile(ctx, "swap", &got, int(f.Fd()))
		if err != nil || got != "m" {
			t.Fatal(got, err)
		}
		other := os.NewFile(uintptr(fd), "other")
		if b, err := io.ReadAll(other); err != nil || string(b) != "o" {
			t.Errorf("%q %v", b, err)
		}
		other.Close()
	}
	if err := k.Ask(ctx, "descriptors", &after); err != nil || after != before {
		t.Errorf("%s descriptors before, %s after (%v)", before, after, err)
	}
	// Cancelling what is at work, several times, with requests between.
	for range 5 {
		short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
		if err := k.Ask(short, "wait", nil); err == nil || err.Error() != "given up" {
			t.Error(err)
		}
		// What is cancelled already is not waited for.
		if err := k.Ask(short, "wait", nil); err == nil || err.Error() != "given up" {
			t.Error(err)
		}
		cancel()
		if err := k.Ask(ctx, "ab", &got); err != nil || got != "abab" {
			t.Errorf("%q %v", got, err)
		}
	}
	// The end of this side is the end of the other, also while it works.
	go func() { _ = k.Ask(ctx, "wait", nil) }()
	time.Sleep(50 * time.Millisecond)
	if err := unix.Shutdown(k.socket, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(dir, "ended")); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the keeper stays")
		}
	}
}

func TestSetupError(t *testing.T) {
	k, err := Start(42, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if err := k.Ask(t.Context(), "ab", nil); err == nil || !strings.Contains(err.Error(), "json") {
		t.Error(err)
	}
}
