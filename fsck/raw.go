package fsck

import (
	"context"

	"github.com/imagestack/imagestack/backend"
)

var codeRawRagged = Register("raw.size.ragged", Note,
	"The length of a raw image is not a multiple of 512 bytes. The last sector is completed with zeros where the disk is shown.",
	"Nothing, if the image was always so; else the file was cut off, and a backup has the rest.")

// rawChecker checks raw images, of which only the length can be wrong.
type rawChecker struct{}

func init() { RegisterChecker(rawChecker{}) }

func (rawChecker) Format() string { return "raw" }

func (rawChecker) Check(_ context.Context, f backend.File, o Options, sink Sink) (Stats, error) {
	size, err := o.Reader(f).Size()
	if err != nil {
		return Stats{}, err
	}
	if size%sector != 0 {
		sink.Report(Finding{Code: codeRawRagged, Text: "the last sector is incomplete",
			Place: Place{Offset: size &^ (sector - 1), Field: "file size", Value: size}})
	}
	return Stats{Format: "raw", VirtualSize: size, ClusterSize: sector, ImageEnd: size}, nil
}
