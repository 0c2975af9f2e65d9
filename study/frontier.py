from est_cli.reports.frontier import Frontier as Frontier
