// Package cli is what the command line tools share: exit codes, the form of
// messages, flags and sizes, JSON output, signals, and the handshake by which
// a program goes to the background.
//
// Design note. A tool is a struct of kong flags and one function
// func(context.Context) error; Main turns the error into a message on stderr
// and an exit code, so that no other code prints errors or exits. Names of
// flags, JSON keys and exit codes are an interface: scripts depend on them.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/alecthomas/kong"

	"github.com/imagestack/imagestack/internal/sandbox"
)

// Version is set by the linker.
var Version = "unknown"

// Common are the flags that every tool has.
type Common struct {
	Verbose bool             `short:"v" help:"Say more on stderr."`
	Version kong.VersionFlag `help:"Print the version and exit."`
}

// ImageFlags say how an image is opened; every tool that takes an IMAGE has
// them.
type ImageFlags struct {
	Format        string   `placeholder:"FMT" help:"Format of IMAGE: raw, ploop (alias parallels) or qcow2; found out if not given."`
	BackingFormat string   `placeholder:"FMT" help:"Format of a backing file whose format the image does not state."`
	AllowPath     []string `placeholder:"DIR" sep:"none" help:"Also allow parents and data files in this directory (repeatable)."`
	CacheSize     Size     `placeholder:"SIZE" help:"Memory for metadata, such as 256M (default 64M)."`
}

// SandboxFlags say how much a tool that reads images gives up before it does.
type SandboxFlags struct {
	Sandbox sandbox.Mode `enum:"auto,require,off" default:"auto" help:"Isolation of the process that reads the image: auto (as much as the kernel offers), require (or fail) or off."`
}

// Confine is sandbox.Confine. What this system does not offer is told to warn,
// or with sandbox.Require is an error that says what else there is.
func Confine(p sandbox.Policy, warn func(what string)) error {
	warnings, err := sandbox.Confine(p)
	for _, w := range warnings {
		warn(w)
	}
	if err != nil {
		return WithHint(err, "--sandbox=auto goes on with what there is")
	}
	return nil
}

// ProgressFlag is the flag of tools that take a while.
type ProgressFlag struct {
	Progress string `default:"auto" placeholder:"MODE" help:"Progress on stderr: auto (a bar on a terminal), bar, plain or none."`
}

// Start returns the display that the flag asks for, nil for none.
func (f *ProgressFlag) Start(stderr io.Writer) (*Progress, error) {
	return NewProgress(f.Progress, stderr)
}

// Tool is a program of the house.
type Tool struct {
	Name        string
	Description string
	Flags       any // pointer to the struct of flags, for kong
	// Run does the work. parsed gives access to the chosen subcommand.
	Run     func(ctx context.Context, parsed *kong.Context) error
	Options []kong.Option // further ones
	// Codes maps the exit codes of the house to the tool's own, where those
	// are an older interface (fsck(8)); nil keeps them.
	Codes func(code int) int
}

// Main runs the tool with the arguments of the process and exits.
func Main(t Tool) {
	ctx, stop := withSignals(context.Background())
	code := t.Execute(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// exited carries the exit code of --help and --version out of the parser.
type exited int

// Execute parses the arguments, runs the tool, prints what went wrong to
// stderr and returns the exit code.
func (t Tool) Execute(ctx context.Context, args []string, stdout, stderr io.Writer) (code int) {
	defer func() {
		if r := recover(); r != nil {
			e, ok := r.(exited)
			if !ok {
				panic(r)
			}
			code = int(e)
		}
	}()
	options := append([]kong.Option{
		kong.Name(t.Name),
		kong.Description(t.Description),
		kong.Vars{"version": t.Name + " " + Version},
		kong.Writers(stdout, stderr),
		kong.Exit(func(code int) { panic(exited(code)) }),
	}, t.Options...)
	parser, err := kong.New(t.Flags, options...)
	if err != nil {
		panic(err) // the struct of flags is wrong: a defect of the program
	}
	parsed, err := parser.Parse(args)
	if err != nil {
		return t.fail(stderr, Usage(err))
	}
	if err := t.Run(ctx, parsed); err != nil {
		return t.fail(stderr, err)
	}
	return ExitOK
}

// fail prints err and returns its exit code.
func (t Tool) fail(stderr io.Writer, err error) int {
	code := ExitCode(err)
	var status statusError
	if errors.As(err, &status) && status.err == nil {
		return code // everything was said already
	}
	fmt.Fprint(stderr, Message(t.Name, err))
	if t.Codes != nil {
		code = t.Codes(code)
	}
	return code
}

// PrintJSON writes v as one indented JSON document.
func PrintJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
