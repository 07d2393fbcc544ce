package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/layers"
)

// Exit codes of all tools but image-fsck.
const (
	ExitOK        = 0
	ExitFailed    = 1 // nothing is lost
	ExitUsage     = 2
	ExitInUse     = 3   // the image is in use or locked
	ExitDamaged   = 4   // run image-fsck
	ExitInterrupt = 130 // Ctrl-C
)

// statusError gives err an exit code; without err the tool has said
// everything already.
type statusError struct {
	code int
	err  error
}

func (e statusError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e statusError) Unwrap() error { return e.err }

// Exit is an error that ends the tool with that code and prints nothing.
func Exit(code int) error { return statusError{code: code} }

// WithExit gives err an exit code of its own.
func WithExit(code int, err error) error { return statusError{code: code, err: err} }

// Usage marks err as a wrong command line.
func Usage(err error) error { return statusError{code: ExitUsage, err: err} }

// Usagef is Usage of a new error.
func Usagef(format string, args ...any) error { return Usage(fmt.Errorf(format, args...)) }

// hintError adds what to do next.
type hintError struct {
	error
	hint string
}

func (e hintError) Unwrap() error { return e.error }

// WithHint adds a line that says what to do next.
func WithHint(err error, format string, args ...any) error {
	return hintError{err, fmt.Sprintf(format, args...)}
}

// ExitCode is the exit code for an error.
func ExitCode(err error) int {
	var status statusError
	var caught SignalError
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &status):
		return status.code
	case errors.As(err, &caught):
		return caught.ExitCode()
	case errors.Is(err, context.Canceled):
		return ExitInterrupt
	case errors.Is(err, layers.ErrInUse):
		return ExitInUse
	case errors.Is(err, layers.ErrCorrupt):
		return ExitDamaged
	}
	return ExitFailed
}

// Message is what is printed for an error: "tool: what: why", and what to do
// next where that is known.
func Message(tool string, err error) string {
	var b strings.Builder
	// Joined errors are lines of their own.
	for line := range strings.Lines(err.Error()) {
		fmt.Fprintf(&b, "%s: %s\n", tool, clip(strings.TrimRight(line, "\n")))
	}
	if hint := hintFor(tool, err); hint != "" {
		fmt.Fprintf(&b, "%s: %s\n", tool, hint)
	}
	return b.String()
}

// maxLine bounds a line of a message, bytes: names in an image may be long.
const maxLine = 2000

// clip shortens a long line in its middle; the reason stands at its end.
func clip(line string) string {
	if len(line) <= maxLine {
		return line
	}
	return strings.ToValidUTF8(line[:maxLine/2], "") + " … " + strings.ToValidUTF8(line[len(line)-maxLine/2:], "")
}

func hintFor(tool string, err error) string {
	var hinted hintError
	switch {
	case errors.As(err, &hinted):
		return hinted.hint
	case ExitCode(err) == ExitUsage:
		return fmt.Sprintf("try: %s --help", tool)
	case ExitCode(err) == ExitDamaged && tool != "image-fsck":
		return "the image is damaged; nothing was changed. Look at it with: image-fsck -n " + imageOf(err)
	case ExitCode(err) == ExitInUse:
		return "another program holds the image; end it (fuser -v names it) and try again"
	case errors.Is(err, layers.ErrPolicy):
		if msg := err.Error(); !strings.Contains(msg, "--") {
			return "see --allow-path, --format and --backing-format"
		}
	}
	return ""
}

// imageOf is the path of the image that an error is about.
func imageOf(err error) string {
	var e *layers.ImageError
	if errors.As(err, &e) {
		return e.Path
	}
	return "IMAGE"
}

// SignalError is the cause (context.Cause) of a context that a signal ended.
type SignalError struct{ Signal unix.Signal }

func (e SignalError) Error() string { return "stopped by " + unix.SignalName(e.Signal) }

// Is makes errors.Is(err, context.Canceled) hold.
func (e SignalError) Is(target error) bool { return target == context.Canceled }

// ExitCode is 128 and the number of the signal, as of a shell.
func (e SignalError) ExitCode() int { return 128 + int(e.Signal) }

// withSignals returns a context that SIGINT, SIGTERM and SIGHUP cancel. The
// first signal asks the tool to end in good order, a second one of the same
// kind ends it at once.
func withSignals(parent context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(parent)
	ch := make(chan os.Signal, 4)
	signal.Notify(ch, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	go func() {
		s, ok := <-ch
		if !ok {
			return
		}
		sig, _ := s.(unix.Signal)
		cancel(SignalError{sig})
		signal.Reset(sig)
	}()
	return ctx, func() {
		signal.Stop(ch)
		close(ch)
		cancel(nil)
	}
}
